"""Rules about the curves of training: divergence, a loss that does not fall, clipped gradients.

A rule returns the numbers of its evidence, or None. Curves are smoothed; no rule compares the first value of a noisy
curve with the last.
"""

import math
import statistics
from itertools import accumulate
from typing import Any

from sft_recipe.report.curves import SIGNIFICANT, ends, noise, smooth, swings, uncertainty
from sft_recipe.report.run import Run

MIN_STEPS = 8  # fewer steps show no trend
EXPLODED = 10.0  # nats per token: about that of guessing among 22,000 tokens, above that of any pretrained model
RISE = 1.1  # times the start: the noise of a healthy run stays below
FLAT = -0.1, 0.02  # fall of the training loss, as a fraction; a rate that works gains more in a run that is long enough
FLAT_VALIDATION = -0.02, 0.005  # of the validation loss, whose tokens are the same each time: bf16 moves it by 0.003
FLAT_STEPS = 20  # after the warm-up; a flat curve over fewer steps may still be in its beginning
SUCCESS_LOSS = 1.5  # known to give good answers; a flat curve below that loss has converged
HIGH_LOSS = 3.0  # after a complete run: the rate was too low, or the run too short
FLAT_HIGH = 4.0  # a pretrained model is there only where the template or language is wrong, or nothing is learned
SWING = 0.25  # fraction of the mean loss; batches of a healthy run differ less once they are averaged
SWINGS = 2  # one rise and fall may be a hard part of the data
SHORT_WARMUP = 0.03  # fraction of the steps; Adam's second moment is an average of few steps before
JUMP = 1.5  # the loss just after a short warm-up, times that at the start
CLIPPED_STEPS = 0.5  # fraction: most steps
CLIPPED_FACTOR = 50.0  # median norm over the limit; small batches are clipped tenfold in healthy runs, as Adam allows
LOW_RATE, LOW_LORA_RATE = 5e-6, 5e-5  # a quarter of the defaults: below them a flat curve is explained by the rate
BATCH_PART = 0.25  # fraction of the data in one step
FEW_UPDATES = 50  # optimizer steps; fewer change a model little at a usual rate
DEFAULT_BATCH = 4  # not worth lowering


def nonfinite(run: Run) -> dict[str, Any] | None:
    """Return evidence where a loss or a gradient norm is not finite."""
    loss, norm = run.series("train/loss"), run.series("train/grad_norm")
    steps = {
        step for series in (loss, norm) for step, value in zip(series.steps, series.values, strict=True)
        if not math.isfinite(value)
    }  # fmt: skip
    if not steps:
        return None
    return {"count": len(steps), "step": min(steps), "steps": len(loss), "rate": run.peak_rate}


def exploded(run: Run) -> dict[str, Any] | None:
    """Return evidence where the loss rose above that of guessing."""
    losses = run.losses
    if len(losses) < MIN_STEPS:
        return None
    curve = smooth(losses.values)
    for at, (level, lowest) in enumerate(zip(curve, accumulate(curve, min), strict=True)):
        if level > EXPLODED and level > JUMP * lowest:
            return {"loss": max(curve), "low": lowest, "step": losses.steps[at], "rate": run.peak_rate}
    return None


def rising(run: Run) -> dict[str, Any] | None:
    """Return evidence where the loss ends higher than it began."""
    losses = run.losses
    if len(losses) < MIN_STEPS:
        return None
    start, end = ends(losses.values)
    if end < RISE * start or end - start < SIGNIFICANT * uncertainty(losses.values):
        return None
    curve = smooth(losses.values)
    turn = losses.steps[min(range(len(curve)), key=curve.__getitem__)]
    return {"start": start, "end": end, "step": turn, "rate": run.peak_rate}


def oscillating(run: Run) -> dict[str, Any] | None:
    """Return evidence where the loss rises and falls again and again."""
    losses = run.losses
    if len(losses) < FLAT_STEPS:
        return None
    level = statistics.fmean(losses.values)
    size = max(SWING * level, SIGNIFICANT * uncertainty(losses.values))
    count = swings(smooth(losses.values), size)
    return {"count": count, "size": size, "rate": run.peak_rate} if count >= SWINGS else None


def _warmup_steps(run: Run) -> int | None:
    """The warm-up in steps, None where the number of all steps is unknown."""
    fixed, total = run.setting("optim.lr_warmup_steps", -1), run.total_steps
    if fixed > 0 or total is None:
        return int(fixed) if fixed > 0 else None
    is_one_cycle = run.setting("optim.lr_scheduler_type", "") == "onecycle"
    return int(run.setting("optim.pct_start" if is_one_cycle else "optim.lr_warmup_steps_ratio", 0.0) * total)


def long_warmup(run: Run) -> dict[str, Any] | None:
    """Return evidence where the warm-up is as long as the run."""
    steps, total = _warmup_steps(run), run.total_steps
    if steps is None or total is None or steps < total or total < MIN_STEPS:
        return None
    return {"warmup": steps, "total": total, "reached": run.peak_rate, "rate": run.setting("optim.lr", 0.0)}


def short_warmup(run: Run) -> dict[str, Any] | None:
    """Return evidence where the loss jumped just after a warm-up of few steps."""
    losses, steps, total = run.losses, _warmup_steps(run), run.total_steps
    if steps is None or total is None or steps >= SHORT_WARMUP * total or len(losses) < FLAT_STEPS:
        return None
    start, early = losses.values[0], 1 + max(MIN_STEPS, len(losses) // 10)
    peak = max(smooth(losses.values[1:early]))
    if peak < JUMP * start or peak - start < SIGNIFICANT * noise(losses.values[early:]):
        return None
    return {"warmup": steps, "total": total, "start": start, "peak": peak}


def large_batch(run: Run) -> dict[str, Any] | None:
    """Return evidence where a complete run had few steps because each took a large part of the data."""
    losses, per_epoch, total = run.losses, run.steps_per_epoch, run.total_steps
    batch = run.setting("data.train_batch_size", 0)
    if not losses or not per_epoch or not total or batch <= DEFAULT_BATCH or run.last_step < total:
        return None
    is_large = per_epoch <= 1 / BATCH_PART and total < FEW_UPDATES
    if not is_large or ends(losses.values)[1] < SUCCESS_LOSS:
        return None
    return {"batch": batch, "per_epoch": per_epoch, "total": total}


def flat(run: Run) -> dict[str, Any] | None:
    """Return evidence where the loss neither falls nor rises: that of validation where it was measured at step 0."""
    steps = run.last_step - (_warmup_steps(run) or 0)
    validation, losses = run.validation, run.losses
    if steps < FLAT_STEPS or not losses:
        return None
    is_paired = len(validation) > 1 and validation.steps[0] == 0 and validation.steps[-1] == run.last_step
    if is_paired:
        metric, start, end = "val/loss", validation.values[0], validation.values[-1]
        best, (least, most) = min(validation.values), FLAT_VALIDATION
    else:
        metric, (start, end) = "train/loss", ends(losses.values)
        best, (least, most) = end, FLAT
    if end < SUCCESS_LOSS or start - best >= most * start or start - end <= least * start:
        return None
    return {"metric": metric, "start": start, "end": end, "steps": run.last_step, "rate": run.peak_rate}


def low_rate(run: Run) -> dict[str, Any] | None:
    """Return evidence where a flat curve is explained by the learning rate."""
    evidence = flat(run)
    limit = LOW_LORA_RATE if run.setting("lora.enabled") else LOW_RATE
    return evidence if evidence and evidence["rate"] < limit else None


def flat_high(run: Run) -> dict[str, Any] | None:
    """Return evidence where the loss is flat at a level that no pretrained model has."""
    evidence = flat(run)
    return evidence if evidence and evidence["end"] >= FLAT_HIGH else None


def slow(run: Run) -> dict[str, Any] | None:
    """Return evidence where a complete run still falls at a high loss."""
    losses, total = run.losses, run.total_steps
    if len(losses) < FLAT_STEPS or not total or run.last_step < total:
        return None
    start, end = ends(losses.values)
    is_falling = start - end >= SIGNIFICANT * uncertainty(losses.values)
    return {"start": start, "end": end, "rate": run.peak_rate} if is_falling and end > HIGH_LOSS else None


def clipped(run: Run) -> dict[str, Any] | None:
    """Return evidence where most gradients were scaled down to a small fraction."""
    norms, limit = run.series("train/grad_norm").finite().values, run.setting("optim.clip_grad", 0.0)
    if not limit or len(norms) < MIN_STEPS:
        return None
    part, median = sum(norm > limit for norm in norms) / len(norms), statistics.median(norms)
    if part <= CLIPPED_STEPS or median < CLIPPED_FACTOR * limit:
        return None
    return {"percent": 100 * part, "median": median, "limit": limit}
