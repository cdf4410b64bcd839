"""A run that is stopped and resumed ends as one that never stopped, bit for bit; checkpoints guard themselves."""

import json
import shutil
import signal
from datetime import datetime

import pytest
from transformers import AutoTokenizer

from sft_recipe.checkpoint.manifest import read_manifest, write_manifest
from sft_recipe.data import run_inputs
from sft_recipe.data.token_store import TokenStore
from tests.support import tiny
from tests.support.chaos import differences
from tests.support.runs import metrics, run_here

PER_EPOCH = 5  # 18 examples, 4 a step: the last step of an epoch has two
RECORDS = [{"prompt": f"What is {i} and {i}?", "response": f"It is {2 * i}. " * (1 + i % 5)} for i in range(18)]
SHAPE_CACHE_SIZES = {"full": [], "lora": ["lora.enabled=true", "lora.rank=4"]}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    # Dropout, so that random state matters.
    tiny.build_model(folder / "model", attention_dropout=0.1)
    (folder / "data.json").write_text(json.dumps(RECORDS))
    return folder


def arguments(work, output, *extra):
    return [
        f"model.path={work}/model",
        f"data.train_files={work}/data.json",
        f"data.cache_dir={work}/cache",
        f"trainer.output_dir={output}",
        "trainer.device=cpu",
        "trainer.total_epochs=2",
        "optim.lr=1e-2",
        "trainer.max_ckpt_to_keep=null",
        *extra,
    ]


def cut_back(whole, stopped, step):
    """The folder as it would be, had the run been killed some steps after the checkpoint of `step`."""
    shutil.copytree(whole, stopped)
    for path in (stopped / "checkpoints").iterdir():
        if path.name != f"step_{step}":
            shutil.rmtree(path)


@pytest.mark.parametrize("shape", SHAPE_CACHE_SIZES)
@pytest.mark.parametrize("step", [3, PER_EPOCH])
def test_resumed_run_equals_the_uninterrupted_run(work, shape, step, tmp_path):
    whole = work / f"whole-{shape}"
    if not whole.exists():
        assert run_here(*arguments(work, whole, *SHAPE_CACHE_SIZES[shape], "trainer.save_freq=1")) == 0
    stopped = tmp_path / "stopped"
    cut_back(whole, stopped, step)
    resumed = arguments(work, stopped, *SHAPE_CACHE_SIZES[shape], "trainer.save_freq=1", "trainer.resume_from=auto")
    assert run_here(*resumed) == 0
    assert [row["step"] for row in metrics(stopped)] == list(range(1, 2 * PER_EPOCH + 1))
    assert not differences(whole, stopped)


def test_losses_do_not_depend_on_ranks_or_packing(warm, work, tmp_path):
    plain = [
        "fsdp.mixed_precision.param_dtype=fp32",
        "model.override_config={attention_dropout: 0.0}",
        "trainer.save_freq=-1",
    ]
    assert run_here(*arguments(work, tmp_path / "one", *plain)) == 0
    assert (
        run_here(
            *arguments(work, tmp_path / "packed", *plain, "data.max_length=128", "data.micro_batch_size_per_gpu=4")
        )
        == 0
    )
    end = warm.run(arguments(work, tmp_path / "two", *plain), ranks=2)
    assert end.code == 0, end.output
    expected = [row["train/loss"] for row in metrics(tmp_path / "one")]
    assert len(expected) == 2 * PER_EPOCH
    for other in ("packed", "two"):
        assert [row["train/loss"] for row in metrics(tmp_path / other)] == pytest.approx(expected, rel=1e-5)


def test_pruning_keeps_the_newest_and_counts_checkpoints_of_earlier_runs(work, tmp_path):
    keep_two = ["trainer.save_freq=2", "trainer.max_ckpt_to_keep=2"]
    assert run_here(*arguments(work, tmp_path, *keep_two, "trainer.total_training_steps=4")) == 0
    assert (
        run_here(*arguments(work, tmp_path, *keep_two, "trainer.total_training_steps=7", "trainer.resume_from=auto"))
        == 0
    )
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step_4", "step_6", "step_7"]  # the run was resumed from step_4; step_2 is of the earlier one


def test_run_never_overwrites_checkpoints_of_another(work, tmp_path, capfd):
    assert run_here(*arguments(work, tmp_path, "trainer.total_training_steps=1")) == 0
    assert run_here(*arguments(work, tmp_path, "trainer.total_training_steps=1")) == 2
    message = capfd.readouterr().err
    assert "step_1" in message and "--resume_from auto" in message and "--output_dir" in message
    assert len(metrics(tmp_path)) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["data.train_batch_size=3"], "data.train_batch_size: 4 in the checkpoint, 3 now"),
        (["trainer.seed=1"], "trainer.seed: 42 in the checkpoint, 1 now"),
        (["lora.enabled=true"], "lora: off in the checkpoint, rank 8"),
        (["data.max_length=30", "data.truncation=right"], "data: "),
    ],
)
def test_resume_with_other_settings_names_the_differences(work, change, named, tmp_path, capfd):
    whole = work / "whole-full"
    if not whole.exists():
        assert run_here(*arguments(work, whole, "trainer.save_freq=1")) == 0
    capfd.readouterr()
    stopped = tmp_path / "stopped"
    cut_back(whole, stopped, 3)
    before = {path: path.read_bytes() for path in stopped.iterdir() if path.is_file()}
    assert {path.name for path in before} >= {"config.yaml", "data.json", "run.json", "metrics.jsonl"}
    assert run_here(*arguments(work, stopped, *change, f"trainer.resume_from={stopped}/checkpoints/step_3")) == 2
    assert named in capfd.readouterr().err
    assert {path: path.read_bytes() for path in stopped.iterdir() if path.is_file()} == before


def test_resumed_run_says_what_of_the_optimizer_has_changed(work, saved, tmp_path, capfd):
    shutil.copytree(saved, tmp_path / "out")
    again = resume(work, tmp_path / "out", "optim.weight_decay=0.3", "optim.lr=1e-3", "trainer.resume_from=auto")
    capfd.readouterr()
    assert run_here(*again) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "so far: optim.lr=0.001 (before: 0.01), optim.weight_decay=0.3 (before: 0.01)" in said
    assert run_here(*resume(work, tmp_path / "out", *again[-3:], total=4)) == 0
    assert "so far" not in capfd.readouterr().out


@pytest.fixture(scope="module")
def saved(work):
    """A run with one checkpoint, after step 2; copy it before changing it."""
    assert run_here(*arguments(work, work / "saved", "trainer.total_training_steps=2")) == 0
    return work / "saved"


def resume(work, output, *extra, total=3):
    return [*arguments(work, output, f"trainer.total_training_steps={total}"), *extra]


@pytest.mark.parametrize("place", ["model/", "../work/model", "a copy"])
def test_model_at_another_place_is_the_same_model(work, saved, place, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "out")
    shutil.copytree(work / "model", tmp_path / "copy")
    monkeypatch.chdir(work)
    path = {"model/": "model/", "../work/model": f"../{work.name}/model", "a copy": tmp_path / "copy"}[place]
    again = resume(work, tmp_path / "out", f"model.path={path}", "trainer.resume_from=auto")
    assert run_here(*again) == 0
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2, 3]


class Clock(datetime):
    """A clock that is at `day`."""

    day = datetime(2026, 2, 28, 23, 59)

    @classmethod
    def now(cls, tz=None):
        return cls.day


def test_template_that_writes_the_date_keeps_that_of_the_run(work, tmp_path, monkeypatch):
    """The token store may be gone a day later: on another machine, or since the disk was full."""
    monkeypatch.setattr(run_inputs, "datetime", Clock)
    dated = tmp_path / "dated.jinja"
    dated.write_text("Today is {{ strftime_now('%d %b %Y') }}\n" + tiny.CHATML)
    tokenizer = AutoTokenizer.from_pretrained(work / "model")

    def train(name, day, *extra):
        Clock.day = day
        cache = tmp_path / f"cache-{day.day}"
        shared = [f"model.chat_template={dated}", f"data.cache_dir={cache}"]
        assert run_here(*resume(work, tmp_path / name, *shared, *extra)) == 0
        newest = max(cache.glob("tokens/*"), key=lambda path: path.stat().st_mtime_ns)
        text = tokenizer.decode(TokenStore.open(newest)[0][0])
        return text.partition("\n")[0], read_manifest(tmp_path / f"{name}/checkpoints/step_3")["identity"]["data.date"]

    saturday, sunday = ("Today is 28 Feb 2026", "2026-02-28"), ("Today is 01 Mar 2026", "2026-03-01")
    assert train("whole", datetime(2026, 2, 28), "trainer.save_freq=1") == saturday
    cut_back(tmp_path / "whole", tmp_path / "stopped", 2)
    assert train("stopped", datetime(2026, 3, 1), "trainer.resume_from=auto") == saturday
    assert not differences(tmp_path / "whole", tmp_path / "stopped")
    assert train("new", datetime(2026, 3, 1)) == sunday


def test_model_with_other_weights_is_another_model(work, saved, tmp_path, capfd):
    """Its configuration and its size are the same."""
    shutil.copytree(saved, tmp_path / "out")
    other = tiny.build_model(tmp_path / "other", seed=1, attention_dropout=0.1)
    assert run_here(*resume(work, tmp_path / "out", f"model.path={other}", "trainer.resume_from=auto")) == 2
    assert "model.weights: " in capfd.readouterr().err


def test_machines_may_have_the_model_at_different_places(warm, work, tmp_path):
    for rank in (0, 1):
        shutil.copytree(work / "model", tmp_path / f"model-{rank}")
    run = resume(work, tmp_path / "out", f"model.path={tmp_path}/model-${{oc.env:RANK}}", total=1)
    end = warm.run(run, ranks=2)
    assert end.code == 0, end.output


def test_checkpoint_of_an_older_version_has_no_digest_of_the_weights(work, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "out")
    checkpoint = tmp_path / "out/checkpoints/step_2"
    manifest = read_manifest(checkpoint)
    del manifest["identity"]["model.weights"]
    write_manifest(checkpoint, {key: value for key, value in manifest.items() if key != "files"}, manifest["files"])
    assert run_here(*resume(work, tmp_path / "out", "trainer.resume_from=auto")) == 0


@pytest.mark.parametrize("name", ["latest", "latest/", "renamed"])
def test_checkpoint_may_have_another_name(work, saved, name, tmp_path):
    shutil.copytree(saved, tmp_path / "out")
    folder = tmp_path / "out/checkpoints"
    if name == "renamed":
        (folder / "step_2").rename(folder / "renamed")
    else:
        (folder / "latest").symlink_to("step_2")
    keep = "trainer.max_ckpt_to_keep=1"
    assert run_here(*resume(work, tmp_path / "out", f"trainer.resume_from={folder}/{name}", keep)) == 0
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2, 3]
    first = {"latest", "step_2"} if name != "renamed" else {"renamed"}  # what the run was resumed from is kept
    assert {path.name for path in folder.iterdir()} == first | {"step_3"}


def test_damaged_checkpoints_are_not_resumed_from(work, tmp_path, capfd):
    output = tmp_path / "run"
    assert run_here(*arguments(work, output, "trainer.save_freq=2", "trainer.total_training_steps=4")) == 0
    newest = output / "checkpoints/step_4"
    shard = next((newest / "state").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    capfd.readouterr()
    assert run_here(*arguments(work, output, f"trainer.resume_from={newest}")) == 2
    assert shard.name in capfd.readouterr().err


@pytest.mark.parametrize("spec", ["auto", "{folder}/step_9"])
@pytest.mark.parametrize(
    ("change", "remedy"), [("copytree", "Remove it, and"), ("move", "Rename it to step_2, or remove it, and")]
)
def test_checkpoint_under_the_name_of_a_later_step_is_refused(work, saved, spec, change, remedy, tmp_path, capfd):
    shutil.copytree(saved, tmp_path / "out")
    folder = tmp_path / "out/checkpoints"
    getattr(shutil, change)(folder / "step_2", folder / "step_9")
    capfd.readouterr()
    assert run_here(*resume(work, tmp_path / "out", f"trainer.resume_from={spec.format(folder=folder)}")) == 2
    error = capfd.readouterr().err
    assert f"step_9 does not have the name of its step: its manifest says step 2. {remedy} start again." in error
    assert (folder / "step_9").is_dir()


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a folder of checkpoints"])
def test_resume_path_without_a_checkpoint_is_refused(work, there, tmp_path, capfd):
    path = tmp_path / "step_7"
    if there == "an empty folder":
        path.mkdir()
    if there == "a folder of checkpoints":
        (path / "step_3").mkdir(parents=True)
    assert run_here(*arguments(work, tmp_path / "out", f"trainer.resume_from={path}")) == 2
    assert "step_7" in capfd.readouterr().err
    assert not (tmp_path / "out/out").exists()


def test_auto_without_a_checkpoint_starts_from_the_beginning(work, tmp_path):
    assert run_here(*arguments(work, tmp_path, "trainer.resume_from=auto", "trainer.total_training_steps=1")) == 0
    assert len(metrics(tmp_path)) == 1


def test_ctrl_c_finishes_the_step_saves_and_exits_with_75(warm, work, tmp_path):
    output = tmp_path / "run"
    signals = {"phase": "forward", "on_rank": 1, "call": 3, "sends": signal.SIGINT}
    end = warm.run(
        arguments(work, output, "trainer.save_freq=-1"), ranks=2, setup=("tests.support.chaos:send_signal_at", signals)
    )
    assert end.codes == [75, 75], end.output
    last = metrics(output)[-1]["step"]
    assert (output / f"checkpoints/step_{last}/manifest.json").is_file()
    assert "--resume_from auto" in end.output and "Traceback" not in end.output
