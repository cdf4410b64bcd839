"""The learning rate of a step in closed form, equal to PyTorch's and transformers' schedulers step by step."""

import math

from sft_recipe.config.optim import OptimConfig

TIMESCALE = 10_000  # of inverse_sqrt without a warmup, as in transformers


def schedule(step: int, total: int, optim: OptimConfig) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of `total`, as a fraction of `optim.lr`, its peak.

    onecycle is torch.optim.lr_scheduler.OneCycleLR without momentum; the others are transformers' schedules: a linear
    warmup from 0 (wsd: from min_lr_ratio), then the shape that the name says, down to min_lr_ratio, where there is one,
    at step `total`.
    """
    step += not optim.zero_indexed_step
    if optim.lr_scheduler_type == "onecycle":
        return _one_cycle(step, total, optim)
    warmup, lowest = warmup_steps(optim, total), optim.min_lr_ratio
    if step < warmup:
        start = lowest if optim.lr_scheduler_type == "wsd" else 0.0
        return start + (1.0 - start) * step / warmup
    remaining = max(0.0, (total - step) / max(1, total - warmup))
    match optim.lr_scheduler_type:
        case "constant":
            return 1.0
        case "inverse_sqrt":
            timescale = warmup or TIMESCALE
            return math.sqrt(timescale / (step - warmup + timescale))
        case "linear":
            shape = remaining
        case "polynomial":
            shape = remaining**optim.power
        case "wsd":
            decay = min(int(optim.lr_decay_steps_ratio * total), total - warmup)
            shape = _half_cosine(1.0, 0.0, (step - total + decay) / max(1, decay))
        case _:
            shape = _half_cosine(1.0, 0.0, 1.0 - remaining)
    return lowest + (1.0 - lowest) * shape


def warmup_steps(optim: OptimConfig, total: int) -> int:
    """Return the number of steps before the learning rate reaches its peak, in a run of `total` steps."""
    if optim.lr_warmup_steps > 0:
        return optim.lr_warmup_steps
    ratio = optim.pct_start if optim.lr_scheduler_type == "onecycle" else optim.lr_warmup_steps_ratio
    return int(ratio * total)


def _one_cycle(step: int, total: int, optim: OptimConfig) -> float:
    """Half a cosine up to the peak at step `pct_start * total - 1`, and half a cosine down to the last step."""
    start = 1.0 / optim.div_factor
    pct_start = min(1.0, optim.lr_warmup_steps / total) if optim.lr_warmup_steps > 0 else optim.pct_start
    peak, last = pct_start * total - 1, total - 1
    if step <= peak:
        return _half_cosine(start, 1.0, step / peak if peak else 1.0)  # PyTorch divides by zero if the peak is step 0
    # Without a rise PyTorch counts the fall from step -1.
    return _half_cosine(1.0, start / optim.final_div_factor, (step - peak) / (last - peak) if last > peak else 1.0)


def _half_cosine(start: float, end: float, progress: float) -> float:
    """Go from `start` to `end` while `progress` goes from 0 to 1."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, progress))))
