"""scripts/preview_schedule.py: its numbers are PyTorch's, its drawings have their shape, bad input is one message."""

import re
from xml.etree import ElementTree

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from sft_recipe.cli import preview_schedule


def run(capsys, *words):
    code = preview_schedule.main(list(words))
    return code, capsys.readouterr()


def one_cycle(total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = OneCycleLR(optimizer, 1.0, total, cycle_momentum=False), []
    for step in range(total):
        if step:
            optimizer.step()
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_a_schedule_is_drawn_with_its_numbers(capsys, tmp_path):
    path = tmp_path / "schedule.svg"
    code, shown = run(capsys, "optim=onecycle", "--lr", "1.0", "--steps", "20", "--svg", str(path))
    assert code == 0
    rates = one_cycle(20)
    expected = [f"{rates[0]:.3e} at step 1", f"{max(rates):.3e} at step 6", f"{rates[-1]:.3e} at step 20"]
    assert shown.out.splitlines()[0] == f"onecycle, 20 steps: {', '.join(expected)}"
    columns = zip(*(line[11:31].ljust(20) for line in shown.out.splitlines()[2:14]), strict=True)
    heights = [sum(preview_schedule.BLOCKS.index(block) for block in column) for column in columns]
    assert heights == [round(8 * 12 * rate) for rate in rates]
    line = ElementTree.parse(path).getroot().find("{http://www.w3.org/2000/svg}polyline").get("points")
    drawn = [(240 - float(point.split(",")[1])) / 200 for point in line.split()]
    assert drawn == pytest.approx(rates, abs=1e-4)


def test_the_image_of_a_long_run_is_small_and_keeps_the_peak():
    rates = [step / 500 for step in range(500)] + [1.0 - step / 99_500 for step in range(99_500)]
    image = preview_schedule.svg(rates, "long")
    assert len(image) < 20_000 and ",40.00 " in image


def test_steps_are_those_of_the_configuration(capsys):
    assert "cosine, 1,000 steps" in run(capsys)[1].out
    assert "linear, 30 steps" in run(capsys, "optim=linear", "trainer.total_training_steps=30")[1].out
    out = run(capsys, "--recipe", "minimind", "--steps", "100000")[1].out
    assert "cosine, 100,000 steps: 1.000e-06 at step 1, 1.000e-07 at step 100,000" in out
    assert max(map(len, out.splitlines())) < 100


@pytest.mark.parametrize("words", [["--steps", "1"], ["--steps", "1", "optim.lr_warmup_steps=5"], ["--steps", "2"]])
def test_the_shortest_runs_are_drawn(capsys, words):
    code, shown = run(capsys, *words)
    assert code == 0 and re.search(r"step +1", shown.out)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--steps", "0"], "0 is not a number of steps"),
        (["--steps", "1e3"], "1e3 is not a number of steps"),
        (["--steps"], "--steps needs a value"),
        (["--svg", "/nothing/here.svg"], "/nothing/here.svg cannot be written: No such file or directory"),
        (["--recipe", "minimnd"], "Did you mean minimind?"),
        (["optim=onecycl"], "Did you mean onecycle?"),
        (["optim=wsd", "fsdp=megatron"], "strategy=megatron has its own schedules"),
        (["--lr", "-1"], "optim.lr"),
        (["--lrs", "1"], "unknown flag --lrs. Did you mean --lr?"),
        (["schedule.svg"], "cannot read 'schedule.svg'"),
    ],
)
def test_bad_input_is_one_message(capsys, words, expected):
    code, shown = run(capsys, *words)
    assert code == 2 and expected in shown.err and "Traceback" not in shown.err
