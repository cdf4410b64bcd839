"""Answers are those of transformers' own generate, on any number of ranks and with any strategy."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import tiny
from tests.support.runs import metrics

TRAIN = [{"prompt": f"Count to {n}", "response": " ".join(map(str, range(1, n + 1)))} for n in (1, 2, 3, 4, 5, 6)]
MULTI_TURN = {
    "messages": [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "I am fine."},
        {"role": "user", "content": "Count to 2"},
        {"role": "assistant", "content": "1 2"},
    ]
}
NEW_TOKENS = 14
SHAPES = {
    "one": (1, [], None),
    "fsdp2": (2, ["fsdp.strategy=fsdp2"], None),
    "fsdp": (2, ["fsdp.strategy=fsdp"], ("tests.support.fsdp1:enable", {})),
    "lora": (2, ["lora.enabled=true", "lora.merge=true", "optim.lr=3e-2"], None),
    "gpt2": (1, [], None),
    "bloom": (2, [], None),
}


@pytest.fixture(scope="module", params=SHAPES)
def run(request, tmp_path_factory, warm):
    ranks, extra, setup = SHAPES[request.param]
    folder = tmp_path_factory.mktemp("generation")
    tiny.build_model(folder / "model")
    if request.param in ("gpt2", "bloom"):
        from benchmarks.architectures import tiny_config

        AutoModelForCausalLM.from_config(tiny_config(request.param)).save_pretrained(folder / "model")
    (folder / "train.json").write_text(json.dumps(TRAIN))
    (folder / "val.json").write_text(json.dumps([*TRAIN, MULTI_TURN]))
    end = warm.run(
        [
            f"model.path={folder}/model", f"data.train_files={folder}/train.json", f"data.cache_dir={folder}/cache",
            f"data.val_files={folder}/val.json", f"trainer.output_dir={folder}/out", "trainer.device=cpu",
            "trainer.total_epochs=25", "trainer.test_freq=-1", "optim.lr=1e-2", "data.train_batch_size=6",
            "fsdp.mixed_precision.param_dtype=fp32", "data.max_length=64", "eval.generate=7",
            f"eval.max_new_tokens={NEW_TOKENS}", "eval.prompts=[Count to 3]", *extra,
        ],
        ranks=ranks,
        setup=setup,
    )  # fmt: skip
    assert end.code == 0, end.output
    return folder / "out", end.output


def samples(run):
    [row] = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    return row["samples"]


def test_answers_equal_those_of_transformers(run):
    model_folder = run[0] / "checkpoints/step_25/huggingface"
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    found = samples(run[0])
    assert len(found) == 8
    for sample in found:
        ids = tokenizer(sample["prompt"], return_tensors="pt")["input_ids"]
        settings = dict(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        answer = model.generate(ids, **settings)[0, ids.shape[1] :].tolist()
        is_truncated = answer[-1] != tokenizer.eos_token_id
        text = tokenizer.decode(answer if is_truncated else answer[:-1])
        assert sample["answer"] == (text.rstrip("\ufffd") if is_truncated else text)
        assert sample["is_truncated"] == is_truncated


def test_prompts_end_at_the_start_of_the_last_assistant_turn(run):
    found = {sample["reference"]: sample["prompt"] for sample in samples(run[0])}
    assert found["1 2 3"] == "<|im_start|>user\nCount to 3<|im_end|>\n<|im_start|>assistant\n"
    turns = [sample for sample in samples(run[0]) if "I am fine." in sample["prompt"]]
    assert [turn["reference"] for turn in turns] == ["1 2"]
    assert turns[0]["prompt"].endswith("Count to 2<|im_end|>\n<|im_start|>assistant\n")
    assert [sample["set"] for sample in samples(run[0]) if sample["reference"] is None] == ["prompts"]


def test_scores_are_in_the_row_and_in_the_terminal(run):
    from sft_recipe.evaluation.scores import score

    output, text = run
    scored = [sample for sample in samples(output) if sample["reference"] is not None]
    expected = score([sample["answer"] for sample in scored], [sample["reference"] for sample in scored])
    row = metrics(output)[-1]
    assert row["eval/bleu4"] == expected.bleu4 and row["eval/rouge_l"] == expected.rouge_l
    assert row["eval/truncated"] == sum(sample["is_truncated"] for sample in scored)
    assert row["eval/empty"] == sum(not sample["answer"].strip() for sample in scored)
    assert row["eval/samples"] == 7
    said = " ".join(text.split())
    assert f"BLEU-4 {expected.bleu4:.2f}" in said and "tok:13a" in said and "answer" in said
    assert said.index("25/25") < said.index("BLEU-4 "), "the scores come after the line of their step"


def test_fixed_prompts_are_rendered_with_the_variables_of_the_run():
    from sft_recipe.config.trainer import EvalConfig
    from sft_recipe.data.rendering.options import RenderOptions
    from sft_recipe.evaluation.generation import AnswerGenerator

    tokenizer = tiny.build_tokenizer(tiny.CHATML + "{{ style|default('plain') }}")
    config = EvalConfig.model_validate({"prompts": ["Count to 3"]})
    options = RenderOptions(chat_template_kwargs={"style": "terse"})
    [prompt] = AnswerGenerator(config, {}, tokenizer, [], lambda *_: [], 10, options=options).prompts
    assert tokenizer.decode(prompt.ids) == "<|im_start|>user\nCount to 3<|im_end|>\n<|im_start|>assistant\nterse"


def test_prompts_are_taken_from_each_set_in_turn(tmp_path):
    """A set that has too few leaves its place to the others."""
    from sft_recipe.evaluation.generation import _validation_prompts

    sets = {name: [([1, n, 9], [0, 0, 1]) for n in numbers] for name, numbers in {"a": range(9), "b": [7]}.items()}
    sets = {name: [tuple(map(np.array, pair)) for pair in pairs] for name, pairs in sets.items()}
    found = [(prompt.set, prompt.ids[1]) for prompt in _validation_prompts(sets, 5)]
    assert found == [("a", 0), ("b", 7), ("a", 1), ("a", 2), ("a", 3)]
