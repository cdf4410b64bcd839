"""train.log has a line of each step and of each epoch, also where a run resumes; log_freq thins out only the rest."""

import re

import pytest

from tests.support.runs import metrics, run_here
from tests.support.small_run import arguments

STEP = r"step: (\d+), epoch: ([\d.]+), loss: ([\d.]+), lr: ([\d.e+-]+), grad_norm: ([\d.]+), tokens_per_s: (\d+)"
EPOCH = r"epoch: (\d+), avg_loss: ([\d.]+)"


def matching(folder, pattern):
    lines = (folder / "out/train.log").read_text().splitlines()
    return [match.groups() for line in lines if (match := re.fullmatch(pattern, line))]


@pytest.fixture(scope="module")
def run(model_dir, tmp_path_factory):
    """Two epochs of five steps, stopped after six and resumed, with a line on the console every four steps."""
    folder = tmp_path_factory.mktemp("log")
    common = arguments(model_dir, folder, "trainer.log_freq=4", "trainer.logger=[console,file]")
    assert run_here(*common, "trainer.total_training_steps=6") == 0
    (folder / "out/train.log").write_text("half a li")
    return folder, common


def test_each_step_and_each_epoch_has_a_line(run, capfd):
    folder, common = run
    assert run_here(*common, "trainer.resume_from=auto") == 0
    rows, steps, epochs = metrics(folder / "out"), matching(folder, STEP), matching(folder, EPOCH)
    assert len((folder / "out/train.log").read_text().splitlines()) == len(steps) + len(epochs) == 12
    assert [int(step) for step, *_ in steps] == list(range(1, 11))
    for row, (_, epoch, loss, rate, norm, _) in zip(rows, steps, strict=True):
        assert float(epoch) == row["epoch"] and float(norm) == pytest.approx(row["train/grad_norm"], abs=1e-4)
        assert float(loss) == pytest.approx(row["train/loss"], abs=1e-4)
        assert float(rate) == pytest.approx(row["train/lr"], rel=1e-6)
    means = []
    for part in (rows[:5], rows[5:]):  # over the tokens of the epoch
        tokens = sum(row["train/supervised_tokens"] for row in part)
        means.append(sum(row["train/loss"] * row["train/supervised_tokens"] for row in part) / tokens)
    assert [int(epoch) for epoch, _ in epochs] == [1, 2]
    assert [float(mean) for _, mean in epochs] == pytest.approx(means, abs=1e-4)
    shown = [int(step) for step in re.findall(r"step (\d+)/10 ", capfd.readouterr().out)]
    assert shown == [8, 10]  # of the resumed part: every fourth, and the end of the epoch


def test_loggers_get_the_same_steps_as_the_console(run):
    folder, _ = run
    logged = next((folder / "out").glob("sft_recipe/*.jsonl")).read_text()
    steps = {int(step) for step in re.findall(r'"step":\s*(\d+)', logged)}
    assert steps == {8, 10}  # verl's file logger begins anew when a run is resumed


def test_a_run_has_a_name(run, tmp_path, capfd):
    _, common = run
    extra = [f"trainer.output_dir={tmp_path}/there", "trainer.total_training_steps=1"]
    assert run_here(*common, *extra) == 0
    assert re.search(r"run +there", capfd.readouterr().out)
    assert run_here(*common, *extra, f"trainer.output_dir={tmp_path}/here", "trainer.run_name=first try") == 0
    out = capfd.readouterr().out
    assert re.search(r"run +first try", out) and re.search(r"free +[\d.]+ GiB of memory, [\d.]+ GiB of disk", out)
    assert (tmp_path / "here/sft_recipe/first try.jsonl").is_file()


def test_the_banner_names_the_recipe_and_what_was_changed(run, tmp_path, capfd):
    _, common = run
    assert run_here(*common, "recipe=small", f"trainer.output_dir={tmp_path}", "trainer.total_training_steps=1") == 0
    out = " ".join(re.sub("[│╭╮╰╯─]", " ", capfd.readouterr().out).split())
    assert "recipe small, changed: " in out and "optim.lr=1e-2" in out and "trainer.total_training_steps=1" in out


def test_data_limit_takes_the_first_examples(run, tmp_path):
    _, common = run
    extra = ["data.limit=3", "data.order=file", "trainer.total_epochs=1", "data.train_batch_size=1"]
    assert run_here(*common, *extra, f"trainer.output_dir={tmp_path}/few") == 0
    assert run_here(*common, *extra[1:], "trainer.total_training_steps=3", f"trainer.output_dir={tmp_path}/all") == 0
    few, first = metrics(tmp_path / "few"), metrics(tmp_path / "all")
    assert len(few) == 3 and [row["train/tokens"] for row in few] == [row["train/tokens"] for row in first]
    assert [row["epoch"] for row in few] == [0.3333, 0.6667, 1.0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.log_freq=0", "trainer.log_freq is 0; it should be greater than or equal to 1"),
        ("trainer.log_freq=often", "trainer.log_freq is 'often'"),
        ("data.limit=0", "data.limit is 0; it should be greater than or equal to 1"),
        ("data.limit=0.5", "data.limit is 0.5"),
        ("trainer.run_name=''", "trainer.run_name is empty"),
    ],
)
def test_bad_values_are_one_message(run, capfd, override, expected):
    assert run_here(*run[1], override) == 2
    error = " ".join(capfd.readouterr().err.split())
    assert expected in error and "Traceback" not in error
