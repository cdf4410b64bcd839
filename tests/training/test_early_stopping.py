"""Which evaluation is the best, when a run has seen enough, and that both survive kills and resumes."""

import json
import shutil
import signal

import pytest

from sft_recipe.config.trainer import EarlyStoppingConfig
from sft_recipe.errors import ConfigError
from sft_recipe.training.early_stopping import EarlyStopping
from tests.support import tiny
from tests.support.chaos import differences
from tests.support.composing import load_config
from tests.support.runs import all_rows, run_here

RECORDS = [{"prompt": f"What is {i} and {i}?", "response": f"It is {2 * i}. " * (1 + i % 5)} for i in range(24)]


def follow(values, **settings):
    """Which of the evaluations were the best so far, and after how many the run stops and why."""
    stopping, best = EarlyStopping(EarlyStoppingConfig(**settings)), []
    for count, value in enumerate(values, 1):
        stopping = EarlyStopping(stopping.config, json.loads(json.dumps(stopping.state())))  # as after a resume
        if stopping.update({"val/loss": value}):
            best.append(count)
        if reason := stopping.reason():
            return best, count, reason
    return best, None, ""


def test_without_patience_and_target_a_run_never_stops():
    assert follow([3, 4, 2, 5, 5, 5]) == ([1, 3], None, "")


def test_patience_counts_evaluations_without_improvement():
    best, stopped, reason = follow([3, 2, 2, 2.5, 1], patience=2)
    assert (best, stopped) == ([1, 2], 4)
    assert reason == "val/loss has not improved in 2 evaluations (best 2, now 2.5)"


def test_a_change_below_min_delta_is_the_best_but_no_improvement():
    best, stopped, reason = follow([3, 2.95, 2.91, 2.5], patience=2, min_delta=0.1)
    assert (best, stopped) == ([1, 2, 3], 3)
    assert "by 0.1 in 2 evaluations" in reason


def test_small_improvements_add_up_to_min_delta():
    assert follow([3, 2.95, 2.89, 2.85], patience=2, min_delta=0.1) == ([1, 2, 3, 4], None, "")


def test_higher_is_better_with_mode_max():
    assert follow([1, 3, 2, 2], patience=2, mode="max")[:2] == ([1, 2], 4)


@pytest.mark.parametrize("mode, values", [("min", [2, 1.5, 1.4, 1.0]), ("max", [1, 1.5, 1.6, 2])])
def test_target_must_be_passed(mode, values):
    best, stopped, reason = follow(values, target=1.5, mode=mode)
    assert stopped == 3 and "better than the target 1.5" in reason


def test_nan_is_never_the_best():
    assert follow([float("nan"), 3, float("nan")], patience=2) == ([2], None, "")
    assert follow([float("nan")] * 2, patience=2) == (
        [], 2, "val/loss has not improved in 2 evaluations (never a number, now nan)"
    )  # fmt: skip


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["trainer.early_stopping.metric=val/los"], "val/los is not computed by this run, which has none without"),
        (["trainer.early_stopping.patience=3"], "none without validation data"),
        (["data.val_ratio=0.1", "trainer.early_stopping.metric=val/zh/loss"], "val/loss, val/perplexity"),
        (["data.val_files={zh: a.json}", "trainer.early_stopping.metric=val/en/loss"], "val/zh/loss"),
        (["data.val_ratio=0.1", "trainer.early_stopping.metric=eval/bleu4"], "eval.generate=8 adds those of answers"),
        (["data.val_files={a/b: a.json}"], "'a/b' is no name of a set"),
    ],
)
def test_metrics_that_do_not_exist_are_errors_of_the_configuration(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides)


def test_metrics_of_named_sets_can_be_compared():
    config = load_config(["data.val_files={zh: a.json, en: b.json}", "trainer.early_stopping.metric=val/en/loss"])
    assert config.trainer.early_stopping.metric == "val/en/loss"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("early")
    tiny.build_model(folder / "model")
    (folder / "train.json").write_text(json.dumps(RECORDS[:16]))
    (folder / "val.json").write_text(
        json.dumps([{"prompt": "你好", "response": "很好，谢谢。"}] * 3, ensure_ascii=False)
    )
    return folder


def arguments(work, output, *extra):
    """Validation data unlike the training data: its loss soon rises, and the best evaluation is not the last."""
    return [
        f"model.path={work}/model", f"data.train_files={work}/train.json", f"data.val_files={work}/val.json",
        f"data.cache_dir={work}/cache", f"trainer.output_dir={output}", "trainer.device=cpu", "trainer.total_epochs=6",
        "trainer.test_freq=2", "trainer.save_freq=3", "optim.lr=0.03", "optim.lr_scheduler_type=constant",
        "optim.lr_warmup_steps_ratio=0", "trainer.early_stopping.patience=3", *extra,
    ]  # fmt: skip


def test_values_of_another_metric_are_not_compared():
    before = EarlyStopping(EarlyStoppingConfig())
    before.update({"val/loss": 6.3})
    config = EarlyStoppingConfig(metric="val/token_accuracy", mode="max", patience=2)
    stopping = EarlyStopping(config, before.state())
    assert stopping.update({"val/token_accuracy": 0.1}) and stopping.reason() is None


def test_tool_calls_are_compared_only_where_the_data_has_some(work, tmp_path, capfd):
    metric = ["eval.generate=2", "trainer.early_stopping.metric=eval/tool_match", "trainer.early_stopping.mode=max"]
    assert run_here(*arguments(work, tmp_path, *metric)) == 2
    assert "no answer of the data calls a tool" in capfd.readouterr().err
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def whole(work):
    output = work / "whole"
    assert run_here(*arguments(work, output)) == 0
    return output


def evaluated(output):
    return {row["step"]: row["val/loss"] for row in all_rows(output) if "val/loss" in row}


def test_the_best_checkpoint_is_kept_and_named(whole):
    losses = {step: loss for step, loss in evaluated(whole).items() if step}
    best = min(losses, key=lambda step: losses[step])
    steps = sorted(losses)
    assert steps[-1] == steps[steps.index(best) + 3]  # stopped after three more evaluations
    assert (whole / "checkpoints/best").resolve().name == f"step_{best}"
    kept = {path.name for path in (whole / "checkpoints").glob("step_*")}
    assert len(kept) == 3 and f"step_{best}" in kept  # beside the two newest
    assert (whole / "checkpoints/best/huggingface/model.safetensors").is_file()


def test_a_run_says_why_it_stopped_early_and_where_the_best_model_is(work, capsys):
    output = work / "said"
    assert run_here(*arguments(work, output)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Stopped early at step" in said and "val/loss has not improved in 3 evaluations" in said
    assert "The best evaluated model" in said and str(output / "checkpoints/best") in said


def test_a_run_that_stopped_early_is_over_when_resumed_unless_it_may_wait_longer(work, whole, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy, symlinks=True)
    before = evaluated(copy)
    assert run_here(*arguments(work, copy, "trainer.resume_from=auto")) == 0
    assert "the run stopped early" in " ".join(capsys.readouterr().out.split()) and evaluated(copy) == before
    longer = ["trainer.resume_from=auto", "trainer.early_stopping.patience=4"]
    assert run_here(*arguments(work, copy, *longer)) == 0
    assert len(evaluated(copy)) == len(before) + 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_stopping_early_and_best_are_exact_through_a_kill(work, warm, tmp_path, ranks):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert warm.run(arguments(work, whole), ranks=ranks).code == 0
    kill = ("tests.support.chaos:send_signal_at", dict(phase="optimizer step", on_rank=0, call=6, sends=signal.SIGKILL))
    assert warm.run(arguments(work, killed), ranks=ranks, setup=kill).code != 0
    end = warm.run(arguments(work, killed, "trainer.resume_from=auto"), ranks=ranks)
    assert end.code == 0, end.output
    assert evaluated(killed) == evaluated(whole)
    assert (killed / "checkpoints/best").resolve().name == (whole / "checkpoints/best").resolve().name
    assert not differences(killed, whole)


def test_best_can_be_resumed_from(work, whole, tmp_path):
    extra = [f"trainer.resume_from={whole}/checkpoints/best", "trainer.early_stopping.patience=null"]
    assert run_here(*arguments(work, tmp_path / "out", *extra, "trainer.total_training_steps=20")) == 0
    assert max(evaluated(tmp_path / "out")) == 20


def test_without_save_best_no_checkpoint_is_saved_for_an_evaluation(work, tmp_path):
    extra = ["trainer.save_best=false", "trainer.max_ckpt_to_keep=null", "trainer.early_stopping.patience=null"]
    assert run_here(*arguments(work, tmp_path, *extra, "trainer.total_training_steps=6")) == 0
    steps = {path.name for path in (tmp_path / "checkpoints").glob("step_*")}
    assert steps == {"step_3", "step_6"}
    assert (tmp_path / "checkpoints/best").resolve().name == "step_6"  # the only one of them that was evaluated


def copied(whole, folder, *without):
    """A copy of the run in which links became folders, without some of its checkpoints."""
    shutil.copytree(whole, folder)
    for name in without:
        shutil.rmtree(folder / "checkpoints" / name)
    return folder


@pytest.mark.parametrize("has_no_other", [True, False])
def test_a_best_checkpoint_that_became_a_folder_is_kept_under_its_step(work, whole, tmp_path, has_no_other):
    best = (whole / "checkpoints/best").resolve().name
    others = [path.name for path in (whole / "checkpoints").glob("step_*") if path.name != best]
    copy = copied(whole, tmp_path / "copy", *others, *([best] if has_no_other else []))
    extra = [f"trainer.resume_from={copy}/checkpoints/best", "trainer.early_stopping.patience=null"]
    assert run_here(*arguments(work, copy, *extra, "trainer.total_training_steps=20")) == 0
    assert (copy / "checkpoints" / best).is_dir() and (copy / "checkpoints/best").is_symlink()
    assert min(row["step"] for row in all_rows(copy) if row["step"] > int(best[5:])) == int(best[5:]) + 1


def test_a_folder_best_that_is_another_checkpoint_is_an_error(work, whole, tmp_path, capfd):
    copy = copied(whole, tmp_path / "copy")
    manifest = copy / "checkpoints/best/manifest.json"
    manifest.write_text(manifest.read_text().replace('"epoch"', '"other"'))
    before = sorted(copy.rglob("*"))
    assert run_here(*arguments(work, copy, "trainer.resume_from=auto")) == 2
    assert "should be a link to a checkpoint" in capfd.readouterr().err
    assert set(before) <= set(copy.rglob("*"))
