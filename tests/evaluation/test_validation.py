"""Validation of named sets equals an independent computation; rows have the right names at the right steps."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import tiny
from tests.support.plain import plain_loss
from tests.support.runs import all_rows

TRAIN = [{"prompt": f"What is {i} and {i}?", "response": f"It is {2 * i}. " * (1 + i % 5)} for i in range(12)]
SETS = {
    "en": [{"prompt": "Hello there, how are you?", "response": "I am fine, thank you. " * n} for n in (1, 3, 7)],
    "zh": [{"prompt": "你好，今天天气怎么样？", "response": "很好，谢谢。" * n} for n in (1, 2)],
}


@pytest.fixture(scope="module")
def work(tmp_path_factory, warm):
    folder = tmp_path_factory.mktemp("validation")
    tiny.build_model(folder / "model")
    (folder / "train.json").write_text(json.dumps(TRAIN))
    for name, records in SETS.items():
        (folder / f"{name}.json").write_text(json.dumps(records, ensure_ascii=False))
    for ranks in (1, 2):
        end = warm.run(arguments(folder, f"run-{ranks}", "trainer.test_freq=2"), ranks=ranks)
        assert end.code == 0, end.output
    return folder


def arguments(folder, output, *extra):
    return [
        f"model.path={folder}/model", f"data.train_files={folder}/train.json", f"data.cache_dir={folder}/cache",
        f"data.val_files={{en: {folder}/en.json, zh: {folder}/zh.json}}", f"trainer.output_dir={folder}/{output}",
        "trainer.device=cpu", "trainer.total_epochs=2", "data.max_length=256", "fsdp.mixed_precision.param_dtype=fp32",
        "optim.lr=1e-2", *extra,
    ]  # fmt: skip


def accuracy(folder, records):
    """The number of supervised tokens that plain transformers predicts, and of all of them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, correct, count = AutoTokenizer.from_pretrained(folder), 0, 0
    for record in records:
        prompt = f"<|im_start|>user\n{record['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        begin = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor(tokenizer(f"{prompt}{record['response']}<|im_end|>")["input_ids"])
        with torch.no_grad():
            predicted = model(ids[None]).logits[0].argmax(-1)
        correct += int((predicted[begin - 1 : -1] == ids[begin:]).sum())
        count += len(ids) - begin
    return correct, count


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("step", [0, 6])
def test_metrics_of_all_sets_equal_plain_transformers(work, ranks, step):
    run = work / f"run-{ranks}"
    row = next(row for row in all_rows(run) if row["step"] == step)
    model = run / "checkpoints/step_6/huggingface" if step else work / "model"
    nll, right, tokens = 0.0, 0, 0
    for name, records in SETS.items():
        loss, (correct, count) = plain_loss(model, records), accuracy(model, records)
        assert row[f"val/{name}/loss"] == pytest.approx(loss, rel=1e-6)
        assert row[f"val/{name}/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert row[f"val/{name}/token_accuracy"] == correct / count and row[f"val/{name}/tokens"] == count
        nll, right, tokens = nll + loss * count, right + correct, tokens + count
    assert row["val/loss"] == pytest.approx(nll / tokens, rel=1e-6)
    assert row["val/token_accuracy"] == right / tokens and row["val/tokens"] == tokens


def test_evaluations_come_before_training_at_the_interval_after_epochs_and_at_the_end(work):
    rows = all_rows(work / "run-1")
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "val/loss" in row] == [0, 2, 3, 4, 6]
    assert not any(key.startswith("train/") for key in rows[0]) and rows[0]["epoch"] == 0


def test_only_the_end_is_evaluated_with_an_interval_of_minus_one(work, warm):
    assert warm.run(arguments(work, "end", "trainer.test_freq=-1")).code == 0
    assert [row["step"] for row in all_rows(work / "end") if "val/loss" in row] == [6]


def test_a_resumed_run_does_not_evaluate_step_0_again(work, warm):
    stop = [*arguments(work, "resumed", "trainer.test_freq=2"), "trainer.save_freq=1", "trainer.total_training_steps=2"]
    assert warm.run(stop).code == 0
    assert warm.run([*stop[:-1], "trainer.total_training_steps=3", "trainer.resume_from=auto"]).code == 0
    assert [row["step"] for row in all_rows(work / "resumed") if "val/loss" in row] == [0, 2, 3]


def test_limit_bounds_each_set(work, warm):
    assert warm.run(arguments(work, "limited", "eval.limit=1")).code == 0
    row = all_rows(work / "limited")[0]
    assert row["val/en/loss"] == pytest.approx(plain_loss(work / "model", SETS["en"][:1]), rel=1e-6)
    assert row["val/zh/loss"] == pytest.approx(plain_loss(work / "model", SETS["zh"][:1]), rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_last_row_of_an_epoch_has_its_mean_loss(work, ranks):
    rows = [row for row in all_rows(work / f"run-{ranks}") if row["step"]]
    for epoch in (rows[:3], rows[3:]):
        nll = sum(row["train/loss"] * row["train/supervised_tokens"] for row in epoch)
        assert epoch[-1]["train/epoch_loss"] == pytest.approx(
            nll / sum(row["train/supervised_tokens"] for row in epoch)
        )
        assert not any("train/epoch_loss" in row for row in epoch[:-1])
