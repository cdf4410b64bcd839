"""A T5 through the program: validation, generated answers with their scores, export, preview and chat."""

import json
import re

import pytest
import torch
from sacrebleu.metrics import BLEU
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests.support import seq2seq
from tests.support.runs import all_rows, run_here

NUMBERS = ["one", "two", "three", "four", "five", "six"]
RECORDS = [{"prompt": f"Count to {n}", "response": " ".join(NUMBERS[:n])} for n in range(1, 7)]
STEPS, NEW_TOKENS = 40, 20


@pytest.fixture(scope="module", params=["t5", "bart"])
def work(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    seq2seq.build_model(folder / "model", request.param)
    (folder / "data.json").write_text(json.dumps(RECORDS))
    settings = [
        f"model.path={folder}/model", f"data.train_files={folder}/data.json", f"data.val_files={folder}/data.json",
        f"data.cache_dir={folder}/cache", f"trainer.output_dir={folder}/out", "data.train_batch_size=6",
        "data.max_length=32", "data.micro_batch_size_per_gpu=6", "optim.lr=1e-2", "trainer.device=cpu",
        f"trainer.total_training_steps={STEPS}", "trainer.test_freq=20", "fsdp.mixed_precision.param_dtype=fp32",
        "eval.generate=6", f"eval.max_new_tokens={NEW_TOKENS}", "eval.prompts=[Count to 3]",
    ]  # fmt: skip
    assert run_here(*settings) == 0
    return folder


def exported(work):
    folder = work / f"out/checkpoints/step_{STEPS}/huggingface"
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def answer(model, tokenizer, prompt):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    found = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, forced_eos_token_id=None)
    return tokenizer.decode(found[0], skip_special_tokens=True)


def test_the_saved_model_loads_and_answers_as_the_samples_say(work):
    model, tokenizer = exported(work)
    rows = [json.loads(line) for line in (work / "out/samples.jsonl").read_text().splitlines()]
    samples = rows[-1]["samples"]
    assert [sample["prompt"] for sample in samples] == ["Count to 3", *(record["prompt"] for record in RECORDS)]
    assert [sample["reference"] for sample in samples] == [None, *(record["response"] for record in RECORDS)]
    assert [sample["answer"] for sample in samples] == [
        answer(model, tokenizer, sample["prompt"]) for sample in samples
    ]


def test_validation_and_bleu_equal_independent_computations(work):
    model, tokenizer = exported(work)
    row = next(row for row in all_rows(work / "out") if row["step"] == STEPS)
    losses, count = 0.0, 0
    for record in RECORDS:
        source, target = (tokenizer(record[key], return_tensors="pt")["input_ids"] for key in ("prompt", "response"))
        losses += float(model(input_ids=source, labels=target).loss) * target.numel()
        count += target.numel()
    assert row["val/loss"] == pytest.approx(losses / count, abs=1e-4)
    answers = [answer(model, tokenizer, record["prompt"]) for record in RECORDS]
    bleu = BLEU(tokenize="13a").corpus_score(answers, [[record["response"] for record in RECORDS]])
    assert row["eval/bleu4"] == pytest.approx(bleu.score) and bleu.score > 20


def test_chat_answers_as_transformers_do(work):
    from sft_recipe.chat.compare import load_models
    from sft_recipe.chat.sampling import Sampling
    from sft_recipe.chat.session import Session

    [chat] = load_models(str(work / "out"), None, torch.device("cpu"))
    reply = Session(chat, Sampling(max_new_tokens=NEW_TOKENS)).ask("Count to 3")
    assert reply.content == answer(*exported(work), "Count to 3")


def test_the_export_is_verified_and_its_card_names_the_class(work, tmp_path):
    from sft_recipe.cli.export import main

    assert main([str(work / "out"), "--out", str(tmp_path / "export")]) == 0
    assert "AutoModelForSeq2SeqLM.from_pretrained" in (tmp_path / "export/README.md").read_text()
    assert main([str(work / "out"), "--out", str(tmp_path / "gguf"), "--format", "gguf"]) == 2


def test_the_preview_shows_both_sides(work, capsys):
    from sft_recipe.cli.preview import main

    settings = [f"model.path={work}/model", f"data.train_files={work}/data.json", "data.max_length=32"]
    assert main(["-n", "6", "--html", str(work / "page.html"), *settings]) == 0
    shown = capsys.readouterr().out
    assert "⟦answer (the decoder's target)⟧ source (for the encoder, no loss)" in shown
    assert "⟦one two" in shown.replace("<s>", "") and "Padding" in (work / "page.html").read_text()


def test_the_preview_marks_what_is_over_either_limit(work):
    from sft_recipe.cli.preview import main

    settings = [f"model.path={work}/model", f"data.train_files={work}/data.json", "data.max_length=32"]
    assert main(["--html", str(work / "limits.html"), *settings, "data.max_target_length=12"]) == 0
    page = (work / "limits.html").read_text()
    marked = re.findall(r'class="over"[^>]*><title>[^:]*: (\d+) records? over a limit', page)
    _, tokenizer = exported(work)
    too_long = sum(len(tokenizer(record["response"])["input_ids"]) > 12 for record in RECORDS)
    assert 0 < too_long < len(RECORDS) and sum(map(int, marked)) == too_long
    assert "MAX_TARGET_LENGTH <b>12</b>" in page
