"""The loop's own promises: validation counts tokens, bad gradients are skipped and counted, rows say what happened."""

import json
import threading
import time
import weakref
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from sft_recipe.config.values import Logger
from sft_recipe.engine.cpu.platform import use_cpu
from tests.engine.test_sft_engine import RECORDS, plain_loss
from tests.support import tiny
from tests.support.runs import metrics, run_here


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    tiny.build_model(folder / "model")
    (folder / "train.json").write_text(json.dumps(RECORDS * 3, ensure_ascii=False))
    (folder / "val.json").write_text(json.dumps(RECORDS, ensure_ascii=False))
    return folder


def arguments(work, output, *extra):
    return [
        f"model.path={work}/model",
        f"data.train_files={work}/train.json",
        f"data.cache_dir={work}/cache",
        f"trainer.output_dir={output}",
        "trainer.device=cpu",
        "fsdp.mixed_precision.param_dtype=fp32",
        "trainer.total_training_steps=2",
        *extra,
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_validation_loss_is_the_mean_over_all_supervised_tokens(warm, work, tokenizer, ranks, tmp_path):
    """Of the saved model, whatever the batch size; the five examples share into no even batches."""
    run = arguments(work, tmp_path, f"data.val_files={work}/val.json", "data.max_length=128", "optim.lr=1e-2")
    assert warm.run(run, ranks=ranks).code == 0
    rows = metrics(tmp_path)
    assert "val/loss" not in rows[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints/step_2/huggingface", dtype=torch.float32)
    with torch.no_grad():
        assert rows[1]["val/loss"] == pytest.approx(plain_loss(model, tokenizer).item(), rel=1e-5)


def test_the_next_step_is_planned_while_one_trains(work, tmp_path, monkeypatch):
    use_cpu()
    from sft_recipe.training.batches import BatchBuilder
    from sft_recipe.training.worker import Worker

    plan, train, planned, trained = BatchBuilder.plan, Worker.train, threading.Semaphore(0), []

    def counted(*given):
        planned.release()
        return plan(*given)

    def waiting(*given):
        for _ in range(1 if trained else 2):  # plans: of this step and of the next
            assert planned.acquire(timeout=60)
        trained.append(train(*given))
        return trained[-1]

    monkeypatch.setattr(BatchBuilder, "plan", counted)
    monkeypatch.setattr(Worker, "train", waiting)
    assert run_here(*arguments(work, tmp_path)) == 0 and len(trained) == 2


def test_a_notice_says_that_ranks_wait_for_the_longest_example(warm, work, tmp_path):
    records = [{"input_ids": [5] * length, "labels": [-100, *[5] * (length - 1)]} for length in (20, 100) * 4]
    (tmp_path / "train.json").write_text(json.dumps(records))
    data = [f"data.train_files={tmp_path}/train.json", "data.order=file", "data.train_batch_size=2"]
    end = warm.run(arguments(work, tmp_path / "run", *data, "trainer.total_training_steps=1"), ranks=2)
    assert end.code == 0, end.output
    assert (
        end.output.count("BATCH_SIZE 2 (data.train_batch_size) keeps 2 ranks busy for at most 60% of their time") == 1
    )
    assert "BATCH_SIZE 4 allows 100%" in " ".join(end.output.split())


def test_graph_of_a_micro_batch_is_freed_before_the_next(work, tmp_path, monkeypatch):
    """Its many small pieces would lie between the activations of the next."""
    use_cpu()
    from sft_recipe.engine.sft_engine import SFTEngine

    real, made, alive = SFTEngine.micro_batch_loss, [], []

    def loss(self, *inputs, **settings):
        alive.append(sum(one() is not None for one in made))
        found = real(self, *inputs, **settings)
        made.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(SFTEngine, "micro_batch_loss", loss)
    assert run_here(*arguments(work, tmp_path, "data.max_length=96")) == 0
    assert len(alive) > 5 and not any(alive)


def test_mfu_is_the_flops_of_matrix_products_over_the_peak(work, tmp_path, monkeypatch):
    use_cpu()
    monkeypatch.setattr("sft_recipe.training.metrics.measured_peak_flops", lambda *_: 1e9)
    run = arguments(work, tmp_path, "data.train_batch_size=1", "trainer.total_training_steps=1")
    assert run_here(*run) == 0
    [row] = metrics(tmp_path)
    tokens, supervised = row["train/tokens"], row["train/supervised_tokens"]
    layer = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64  # query, key, value, output; the MLP
    products = 6 * (2 * layer * tokens + 512 * 32 * supervised) + 12 * 2 * 32 * tokens * (tokens + 1) / 2
    assert row["perf/mfu"] == pytest.approx(products / (tokens / row["perf/tokens_per_s"]) / 1e9)


def test_val_ratio_holds_out_training_examples(work, tmp_path):
    assert run_here(*arguments(work, tmp_path, "data.val_ratio=0.2", "trainer.test_freq=1")) == 0
    rows = metrics(tmp_path)
    assert all(row["val/loss"] > 0 for row in rows)
    assert rows[0]["epoch"] == pytest.approx(1 / 5, abs=1e-3)  # 18 of 21 examples train, 4 a step


@pytest.mark.parametrize(("freq", "steps"), [("1", [1, 2]), ("-1", [2]), ("after_each_epoch", [2])])
def test_save_freq_sets_the_saved_steps(work, tmp_path, freq, steps):
    assert run_here(*arguments(work, tmp_path, f"trainer.save_freq={freq}")) == 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step_{step}" for step in steps]


def test_nonfinite_gradients_are_skipped_and_stop_the_run_with_advice(work, tmp_path, capfd):
    broken = tiny.build_model(tmp_path / "broken", seed=1)
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    model.save_pretrained(broken)
    output = tmp_path / "out"
    run = arguments(work, output, f"model.path={broken}", "trainer.total_training_steps=50")
    assert run_here(*run) == 2
    assert "NaN and infinite values in the model's weights" in capfd.readouterr().err
    assert not (output / "metrics.jsonl").exists()
    run.append("model.verify_first_step=false")
    capfd.readouterr()
    assert run_here(*run) == 2
    error = capfd.readouterr().err
    assert "not finite" in error and "learning rate" in error and "Traceback" not in error
    rows = metrics(output)
    assert len(rows) == 10
    assert rows[-1]["train/skipped_steps"] == 10 and rows[-1]["train/loss"] is None


def no_tokens_in(monkeypatch, is_broken):
    """The loss of steps for which `is_broken` is divided by zero; steps are counted from 1."""
    use_cpu()
    from sft_recipe.engine.sft_engine import SFTEngine

    real, steps = SFTEngine.forward_backward_batch, []

    def forward_backward_batch(self, *inputs, **settings):
        steps.append(len(steps) + 1)
        if is_broken(steps[-1]):
            loss = self.micro_batch_loss
            self.micro_batch_loss = lambda batch, tokens, *rest, **more: loss(batch, tokens * 0, *rest, **more)
        try:
            return real(self, *inputs, **settings)
        finally:
            vars(self).pop("micro_batch_loss", None)

    monkeypatch.setattr(SFTEngine, "forward_backward_batch", forward_backward_batch)


def test_step_with_nonfinite_gradients_leaves_weights_unchanged_and_is_counted(work, tmp_path, monkeypatch, capsys):
    common = [
        "optim.lr=1e-2",
        "optim.lr_scheduler_type=constant",
        "trainer.save_freq=1",
        "trainer.max_ckpt_to_keep=null",
    ]
    no_tokens_in(monkeypatch, lambda step: step == 2)
    assert run_here(*arguments(work, tmp_path, *common)) == 0
    first, second = (load_file(tmp_path / f"checkpoints/step_{n}/huggingface/model.safetensors") for n in (1, 2))
    assert all(value.equal(second[name]) for name, value in first.items())
    assert "1 of 2 steps changed nothing" in " ".join(capsys.readouterr().out.split())


def test_a_run_in_which_no_step_changed_anything_is_an_error(work, tmp_path, monkeypatch, capfd):
    no_tokens_in(monkeypatch, lambda step: True)
    assert run_here(*arguments(work, tmp_path)) == 2
    out, error = capfd.readouterr()
    assert "not finite" in error and "The model is in" not in out


def test_memory_of_a_step_is_the_peak_so_far(work, tmp_path):
    """A gigabyte that was used before and is free again is in it."""
    use_cpu()
    from sft_recipe.engine.cpu.process_memory import peak_memory, process_memory

    held, tensor = process_memory(), torch.ones(2**28)
    before = peak_memory().read()
    assert before >= held + tensor.nbytes
    del tensor
    assert run_here(*arguments(work, tmp_path)) == 0
    rows = [row["perf/memory_gb"] for row in metrics(tmp_path)]
    assert rows == sorted(rows) and rows[0] * 2**30 >= before


def test_metrics_rows_have_step_rate_loss_and_tokens(work, tmp_path):
    assert run_here(*arguments(work, tmp_path, "optim.lr_scheduler_type=linear", "optim.lr=1e-3")) == 0
    first, second = metrics(tmp_path)
    assert (first["step"], second["step"]) == (1, 2)
    assert first["train/lr"] == pytest.approx(1e-3) and second["train/lr"] == pytest.approx(5e-4)
    for key in ("train/loss", "train/grad_norm", "train/tokens", "train/supervised_tokens", "perf/tokens_per_s"):
        assert first[key] > 0
    assert second["train/loss"] < 7


def test_rows_show_the_time_spent_on_data(work, tmp_path, monkeypatch):
    """Reading that takes longer than computing is seen as that."""
    use_cpu()
    from sft_recipe.training.batches import BatchBuilder

    real = BatchBuilder.build
    monkeypatch.setattr(BatchBuilder, "build", lambda *given: time.sleep(1) or real(*given))
    assert run_here(*arguments(work, tmp_path, "model.verify_first_step=false")) == 0
    for row in metrics(tmp_path):
        assert 1 < row["perf/data_seconds"] < row["perf/seconds"] and row["perf/token_efficiency"] == 1


def test_token_efficiency_counts_idle_ranks_and_padding():
    use_cpu()
    from sft_recipe.training.batches import BatchBuilder

    train = SimpleNamespace(lengths=np.array([700, 300, 600, 0, 250]), source_lengths=np.array([600, 100, 300, 0, 150]))

    def efficiency(ranks, budget, has_targets):
        data = SimpleNamespace(token_budget=budget, has_targets=has_targets)
        config = SimpleNamespace(data=data, trainer=SimpleNamespace(seed=0))
        return BatchBuilder(config, train, None, 0, ranks).plan(train, np.array([0, 1, 2, 4])).token_efficiency

    # two ranks: 700 + 250 and 600 + 300; eight: four of them have an example each
    assert [efficiency(ranks, 1000, False) for ranks in (1, 2, 8)] == [1, 1850 / 2 / 950, 1850 / 8 / 700]
    # four rows of at most 600 + 300 tokens in one micro-batch; each row alone in its own
    assert [efficiency(1, 4000, True), efficiency(1, 700, True)] == [1850 / (4 * 900), 1]


def test_schema_lists_the_loggers_of_verl():
    use_cpu()
    from verl.utils.tracking import Tracking

    assert set(get_args(Logger)) == set(Tracking.supported_backend)


@pytest.mark.parametrize("logger", ["tensorboard"])
def test_verl_loggers_receive_the_metrics(work, tmp_path, logger):
    assert run_here(*arguments(work, tmp_path, f"trainer.logger=[console,{logger}]")) == 0
    assert any((tmp_path / "tensorboard").rglob("events.*"))


def test_tilde_in_output_dir_is_expanded_for_all_files(work, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_here(*arguments(work, "'~/run'", "trainer.logger=[tensorboard]")) == 0
    there = {path.name for path in (tmp_path / "run").iterdir()}
    reports = {"data.json", "findings.json", "loss.png", "report.html", "run.json", "train.log"}
    assert there == reports | {".lock", "checkpoints", "config.yaml", "metrics.jsonl", "tensorboard"}


def test_wandb_project_enables_its_logger(work, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert run_here(*arguments(work, tmp_path / "out", "trainer.wandb_project=my_sft")) == 0
    assert any(tmp_path.glob("wandb/offline-run-*"))


def test_resolved_configuration_is_saved_and_usable(work, tmp_path):
    from sft_recipe.config.compose import load_config

    assert run_here(*arguments(work, tmp_path, "optim.lr=3e-4")) == 0
    again = load_config([], config_dir=tmp_path)
    assert again.optim.lr == 3e-4 and again.model.path == f"{work}/model"


@pytest.mark.parametrize(
    ("found", "computed", "dtype"),
    [("float32", "fp32", "float32"), ("float32", "bf16", "float32"), ("bfloat16", "bf16", "bfloat16"),
     ("float16", "bf16", "float16"), ("bfloat16", "fp32", "float32")],
)  # fmt: skip
def test_exported_model_is_complete_and_keeps_its_precision(work, tmp_path, found, computed, dtype, tokenizer):
    source = AutoModelForCausalLM.from_pretrained(work / "model", dtype=getattr(torch, found))
    source.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    run = arguments(work, tmp_path / "out", f"model.path={tmp_path}/source")
    assert run_here(*run, f"fsdp.mixed_precision.param_dtype={computed}") == 0
    saved = tmp_path / "out/checkpoints/step_2/huggingface"
    model, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert str(model.dtype) == f"torch.{dtype}"
    assert json.loads((saved / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert (saved / "chat_template.jinja").read_text() == tokenizer.chat_template


def test_untied_head_and_default_template_are_exported(work, tmp_path, capfd):
    plain = tiny.build_tokenizer(chat_template=None)
    folder = tiny.build_model(tmp_path / "base", tokenizer=plain, tie_word_embeddings=False)
    assert run_here(*arguments(work, tmp_path / "out", f"model.path={folder}")) == 0
    assert "no chat template" in capfd.readouterr().out
    saved = tmp_path / "out/checkpoints/step_2/huggingface"
    assert "<|im_start|>" in (saved / "chat_template.jinja").read_text()
    _, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("shape", [[], ["lora.enabled=true"], ["lora.enabled=true", "lora.merge=true"]])
def test_exported_generation_config_has_the_end_tokens_of_the_data(work, tmp_path, shape):
    """Its own end token is another than the one that ends a turn of the chat template."""
    plain = tiny.build_tokenizer(eos_token="<|endoftext|>")
    folder = tiny.build_model(tmp_path / "base", tokenizer=plain)
    assert run_here(*arguments(work, tmp_path / "out", f"model.path={folder}", *shape)) == 0
    saved = GenerationConfig.from_pretrained(tmp_path / "out/checkpoints/step_2/huggingface")
    assert saved.eos_token_id == [plain.eos_token_id, plain.convert_tokens_to_ids("<|im_end|>")]


def test_exported_adapter_loads_with_transformers(work, tmp_path):
    assert run_here(*arguments(work, tmp_path, "lora.enabled=true", "lora.target_modules=[q_proj,v_proj]")) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints/step_2/huggingface")
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 4
