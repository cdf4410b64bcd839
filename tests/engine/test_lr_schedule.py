"""Every schedule equals PyTorch's or transformers' own scheduler, step by step, also where a run resumes."""

import pytest
import torch
import transformers
from torch.optim.lr_scheduler import OneCycleLR

from sft_recipe.config.optim import OptimConfig
from sft_recipe.engine.lr_schedule import schedule
from tests.support import small_run
from tests.support.runs import metrics, run_here

PEAK = 2.5e-3


def rates(total, **keys):
    """Return the learning rate of each step of a run."""
    optim = OptimConfig.model_validate({"lr": PEAK, "lr_scheduler_type": "cosine", **keys})
    return [PEAK * schedule(step, total, optim) for step in range(total)]


def stepped(build, total):
    """Return the learning rate of each step as a scheduler of PyTorch gives it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler, found = build(optimizer), []
    for step in range(total):
        if step:
            optimizer.step()
            scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("warmup", [0, 1, 7, 50])
@pytest.mark.parametrize(
    ("kind", "reference", "keys", "arguments"),
    [
        ("constant", "constant_with_warmup", {}, {}),
        ("constant_with_warmup", "constant_with_warmup", {}, {}),
        ("linear", "linear", {}, {}),
        ("cosine", "cosine", {}, {}),
        ("cosine", "cosine_with_min_lr", {"min_lr_ratio": 0.1}, {"min_lr_rate": 0.1}),
        ("cosine_with_min_lr", "cosine_with_min_lr", {"min_lr_ratio": 0.5}, {"min_lr_rate": 0.5}),
        ("polynomial", "polynomial", {"power": 2.0, "min_lr_ratio": 0.2}, {"power": 2.0, "lr_end": 0.2 * PEAK}),
        ("polynomial", "polynomial", {}, {"lr_end": 0.0}),
        ("inverse_sqrt", "inverse_sqrt", {}, {}),
        ("wsd", "warmup_stable_decay", {}, {"num_decay_steps": 5}),
        (
            "warmup_stable_decay",
            "warmup_stable_decay",
            {"lr_decay_steps_ratio": 0.4, "min_lr_ratio": 0.1},
            {"num_decay_steps": 20, "min_lr_ratio": 0.1},
        ),
    ],
)
def test_equals_the_scheduler_of_transformers(kind, reference, keys, arguments, warmup):
    total = 51 if warmup == 50 else 50
    if "num_decay_steps" in arguments:  # no more steps than are left after the warmup
        arguments = arguments | {"num_decay_steps": min(arguments["num_decay_steps"], total - warmup)}
    expected = stepped(
        lambda optimizer: transformers.get_scheduler(
            reference, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=arguments
        ),
        total,
    )
    assert rates(total, lr_scheduler_type=kind, lr_warmup_steps=warmup, lr_warmup_steps_ratio=0.0, **keys) == (
        pytest.approx(expected, rel=1e-12, abs=1e-18)
    )


def one_cycle(total, **arguments):
    return stepped(lambda optimizer: OneCycleLR(optimizer, PEAK, total, cycle_momentum=False, **arguments), total)


@pytest.mark.parametrize("total", [2, 3, 7, 20, 101])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"div_factor": 50.0, "final_div_factor": 10.0}, {"pct_start": 0.0}, {"pct_start": 1.0}, {"pct_start": 0.77}],
)
def test_onecycle_equals_that_of_pytorch(total, arguments):
    found = rates(total, lr_scheduler_type="onecycle", **arguments)
    assert found == pytest.approx(one_cycle(total, **arguments), rel=1e-12)


@pytest.mark.parametrize(("warmup", "total"), [(2, 7), (5, 20), (20, 20), (3, 3)])
def test_warmup_steps_are_the_rise_of_onecycle(warmup, total):
    found = rates(total, lr_scheduler_type="onecycle", lr_warmup_steps=warmup)
    assert found == pytest.approx(one_cycle(total, pct_start=warmup / total), rel=1e-12)


def test_onecycle_with_its_peak_at_the_first_step_where_that_of_pytorch_divides_by_zero():
    with pytest.raises(ZeroDivisionError):
        one_cycle(10, pct_start=0.1)
    found = rates(10, lr_scheduler_type="onecycle", pct_start=0.1)
    assert found[0] == PEAK and found == sorted(found, reverse=True) and found[-1] == pytest.approx(PEAK / 25e4)
    assert rates(10, lr_scheduler_type="onecycle", lr_warmup_steps=1) == found
    assert rates(1, lr_scheduler_type="onecycle", pct_start=1.0) == [PEAK]


def test_onecycle_rises_to_the_end_where_the_warmup_is_longer_than_the_run():
    found = rates(10, lr_scheduler_type="onecycle", lr_warmup_steps=100)
    assert found == pytest.approx(one_cycle(10, pct_start=1.0), rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "onecycle", "wsd", "inverse_sqrt", "polynomial"])
def test_counted_from_step_one_each_step_has_the_rate_of_the_next(kind):
    keys = {"lr_scheduler_type": kind, "lr_warmup_steps": 4}
    zero_indexed = rates(20, **keys)
    one_indexed = rates(20, zero_indexed_step=False, **keys)
    assert one_indexed[:-1] == zero_indexed[1:]
    lowest = {"constant": PEAK, "inverse_sqrt": PEAK * (4 / 20) ** 0.5, "onecycle": PEAK / 25e4}
    assert one_indexed[-1] == pytest.approx(lowest.get(kind, 0.0))


@pytest.mark.parametrize("first", [0, 1])
def test_cosine_counted_from_either_step_equals_that_of_verl(first):
    from verl.utils.torch_functional import get_cosine_schedule_with_warmup

    expected = stepped(
        lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 5, 40, 0.1, zero_indexed_step=first == 0), 40
    )
    keys = {"lr_warmup_steps": 5, "min_lr_ratio": 0.1, "zero_indexed_step": first == 0}
    assert rates(40, **keys) == pytest.approx(expected, rel=1e-12)


def test_a_run_and_its_continuation_log_the_rates_of_pytorch(model_dir, tmp_path):
    keys = ["trainer.total_training_steps=8", "optim.lr_scheduler_type=onecycle", f"optim.lr={PEAK}"]
    assert run_here(*small_run.arguments(model_dir, tmp_path, *keys, "trainer.save_freq=3")) == 0
    expected = pytest.approx(one_cycle(8), rel=1e-12)
    assert [row["train/lr"] for row in metrics(tmp_path / "out")] == expected
    resumed = [f"trainer.output_dir={tmp_path}/resumed", f"trainer.resume_from={tmp_path}/out/checkpoints/step_6"]
    assert run_here(*small_run.arguments(model_dir, tmp_path, *keys, *resumed)) == 0
    assert [row["train/lr"] for row in metrics(tmp_path / "resumed")] == pytest.approx(one_cycle(8)[6:], rel=1e-12)
