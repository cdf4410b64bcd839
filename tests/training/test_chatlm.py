"""ChatLM-mini-Chinese: its losses on a tiny T5, from its own tokens and from text; see shared/data/chatlm."""

import json
import shutil

import pytest
import torch
from sacrebleu.metrics import BLEU
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests.support.runs import all_rows, metrics, run_here
from tests.support.shared import shared_data

SETTINGS = [
    "data.order=file",
    "data.train_batch_size=8",
    "data.max_length=320",
    "data.micro_batch_size_per_gpu=2",
    "model.freeze=[encoder,embeddings]",
    "optim.lr_scheduler_type=onecycle",
    "optim.lr=2.5e-3",
    "optim.div_factor=25",
    "optim.weight_decay=0.01",
    "fsdp.mixed_precision.param_dtype=fp32",
    "trainer.total_epochs=1",
    "trainer.save_freq=10",
    "trainer.device=cpu",
]


@pytest.fixture(scope="module")
def chatlm():
    return shared_data("chatlm")


def arguments(chatlm, folder, name, *extra):
    places = [f"model.path={chatlm}/model", f"data.train_files={chatlm}/tokens.jsonl", f"data.cache_dir={folder}/cache"]
    return [*SETTINGS, *places, f"trainer.output_dir={folder}/{name}", *extra]


def assert_equals_trace(chatlm, rows):
    expected = {step["step"]: step for step in json.loads((chatlm / "trace.json").read_text())["steps"]}
    for row in rows:
        step = expected[row["step"]]
        assert row["train/loss"] == pytest.approx(step["loss"], abs=1e-4)
        assert row["train/grad_norm"] == pytest.approx(step["grad_norm"], abs=1e-4)
        assert row["train/lr"] == pytest.approx(step["lr"], rel=1e-6)


@pytest.fixture(scope="module")
def trained(chatlm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatlm")
    assert run_here(*arguments(chatlm, folder, "one")) == 0
    return folder


def test_losses_equal_those_of_the_reference(chatlm, trained):
    rows = metrics(trained / "one")
    assert len(rows) == 20
    assert_equals_trace(chatlm, rows)


def test_what_is_frozen_stays_bit_equal(chatlm, trained):
    before = load_file(chatlm / "model/model.safetensors")
    after = load_file(trained / "one/checkpoints/step_20/huggingface/model.safetensors")
    assert before.keys() == after.keys()
    frozen = {name for name in before if name.startswith("encoder.") or name == "shared.weight"}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == before.keys() - frozen
    assert sum(before[name].numel() for name in changed) == 131_648


def test_a_resumed_run_continues_with_the_same_losses(chatlm, trained):
    first = trained / "one/checkpoints/step_10"
    assert run_here(*arguments(chatlm, trained, "resumed", f"trainer.resume_from={first}")) == 0
    rows = metrics(trained / "resumed")
    assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in metrics(trained / "one")[10:]]


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_two_ranks_have_the_same_losses(chatlm, trained, warm, strategy):
    setup = ("tests.support.fsdp1:enable", {}) if strategy == "fsdp" else None
    end = warm.run(arguments(chatlm, trained, strategy, f"fsdp.strategy={strategy}"), ranks=2, setup=setup)
    assert end.code == 0, end.output
    assert "131,648 trainable of 614,400" in " ".join(end.output.split())
    assert_equals_trace(chatlm, metrics(trained / strategy))


def test_text_gives_the_tokens_of_the_reference(chatlm, tmp_path):
    from transformers import AutoTokenizer

    from sft_recipe.data.pipeline import open_store
    from sft_recipe.data.token_store import StoreOptions

    tokenizer = AutoTokenizer.from_pretrained(chatlm / "model")
    options = StoreOptions(max_length=320, max_target_length=320, max_chars=251, decoder_start_id=0)
    store = open_store([chatlm / "prompt_response.jsonl"], tokenizer, options, tmp_path, workers=1)
    lines = (chatlm / "tokens.jsonl").read_text().splitlines()
    assert len(store) == len(lines) == 160
    for index, line in enumerate(lines):
        record, (ids, mask) = json.loads(line), store[index]
        assert ids.tolist() == record["input_ids"] + record["labels"]
        assert mask.tolist() == [0] * len(record["input_ids"]) + [1] * len(record["labels"])


def test_its_own_checkpoint_trains_and_is_exported(chatlm, tmp_path):
    """What ChatLM's trainer leaves: a state dict with every name of a shared weight, model_config.json, a tokenizer."""
    from sft_recipe.cli.export import main

    original = AutoModelForSeq2SeqLM.from_pretrained(chatlm / "model")
    layout = tmp_path / "model_save"
    layout.mkdir()
    weights = original.state_dict()
    assert weights["encoder.embed_tokens.weight"].data_ptr() == weights["shared.weight"].data_ptr()
    torch.save(weights, layout / "chat_small_t5.best.bin")
    (layout / "model_config.json").write_text(json.dumps(original.config.to_diff_dict()))
    for path in chatlm.glob("model/tokenizer*"):
        shutil.copy(path, layout)
    changes = ["trainer.total_training_steps=2", f"model.path={layout}/chat_small_t5.best.bin"]
    assert run_here(*arguments(chatlm, tmp_path, "out", *changes)) == 0
    first = json.loads((chatlm / "trace.json").read_text())["steps"][0]
    assert metrics(tmp_path / "out")[0]["train/loss"] == pytest.approx(first["loss"], abs=1e-4)
    assert main([str(tmp_path / "out"), "--out", str(tmp_path / "export")]) == 0
    exported = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "export").state_dict()
    changed = {name for name in weights if not torch.equal(weights[name], exported[name])}
    assert exported.keys() == weights.keys() and {name.split(".")[0] for name in changed} == {"decoder"}


def test_a_recipe_stops_early_and_exports_the_best_model(chatlm, tmp_path, capfd):
    data = chatlm / "chatlm_1k.parquet"
    settings = [
        "recipe=chatlm_a", f"model.path={chatlm}/model", f"data.train_files={data}", f"data.val_files={data}",
        f"data.cache_dir={tmp_path}/cache", f"trainer.output_dir={tmp_path}/out", "data.train_batch_size=4",
        "data.order=file", "eval.limit=8", "eval.generate=4", "eval.max_new_tokens=8", "trainer.test_freq=1",
        "trainer.total_training_steps=8", "trainer.early_stopping.patience=2", "trainer.device=cpu",
        "optim.lr=1", "optim.lr_warmup_steps=3",  # so high that the validation loss rises soon
        "fsdp.mixed_precision.param_dtype=fp32",  # as the model below, on any machine
    ]  # fmt: skip
    assert run_here(*settings) == 0
    rows = all_rows(tmp_path / "out")
    losses = {row["step"]: row["val/loss"] for row in rows}
    best = min(losses, key=losses.__getitem__)
    assert 0 < best < 6 and max(losses) == best + 2  # of 8 steps
    assert "val/loss has not improved in 2 evaluations" in " ".join(capfd.readouterr().out.split())
    assert (tmp_path / "out/checkpoints/best").resolve().name == f"step_{best}"
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out/checkpoints/best/huggingface").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/checkpoints/best/huggingface")
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()][best]["samples"]
    ids = tokenizer(samples[0]["prompt"][:251], return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(answer[0], skip_special_tokens=True) == samples[0]["answer"]
    answers, references = ([sample[key] for sample in samples] for key in ("answer", "reference"))
    bleu = BLEU(tokenize="zh").corpus_score(answers, [references])
    assert rows[best]["eval/bleu4"] == pytest.approx(bleu.score, abs=0)
