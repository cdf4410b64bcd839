"""Rules about what a run led to: over-fitting, a model that is worse than before, and what its answers look like.

A rule returns the numbers of its evidence, or None.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from sft_recipe.report.curves import SIGNIFICANT, ends, smooth, uncertainty
from sft_recipe.report.run import GENERAL, Run

OVERFITTED = 1.03  # last validation loss over the best; evaluations of the same model on other hardware differ by less
WORSE = 1.02  # validation loss over that before training
BLEU_NOISE = 40.0  # BLEU points over the root of the number of answers: twice the noise of a corpus of that size
FORGOT = 1.1  # loss on the general prompts over that before training
FULL_RATE = 1e-5  # above, full fine-tuning of a small model often forgets
MIN_STEPS = 8  # fewer steps show no trend
MIN_ANSWERS, MIN_HABIT = 4, 2  # fewer answers, and fewer of them that have it, show no habit
EMPTY, REPEATED, ENDLESS = 0.25, 0.25, 0.5  # fractions of the answers
LONGEST_END = 2000  # characters at the end of an answer that are searched; the search is quadratic
REPEATS = 4  # times in a row that a phrase occurs at the end of an answer that repeats itself


def worse_than_before(run: Run) -> dict[str, Any] | None:
    """Return evidence where the evaluation before training was better than the last one."""
    losses, bleu = run.validation, run.series("eval/bleu4").finite()
    common = {"rate": run.peak_rate, "lora": bool(run.setting("lora.enabled"))}
    if len(losses) > 1 and losses.steps[0] == 0 and losses.values[-1] > WORSE * losses.values[0]:
        return common | {"metric": "val/loss", "before": losses.values[0], "after": losses.values[-1]}
    if len(bleu) > 1 and bleu.steps[0] == 0 and bleu.values[-1] < bleu.values[0] - _bleu_noise(run):
        return common | {"metric": "eval/bleu4", "before": bleu.values[0], "after": bleu.values[-1]}
    return None


def _bleu_noise(run: Run) -> float:
    return BLEU_NOISE / math.sqrt(max(run.series("eval/samples").finite().values, default=1))


def high_rate(run: Run) -> dict[str, Any] | None:
    """Return evidence where a high rate of full fine-tuning explains why the model is worse than before."""
    evidence = worse_than_before(run)
    return evidence if evidence and not evidence["lora"] and evidence["rate"] > FULL_RATE else None


def forgetting(run: Run) -> dict[str, Any] | None:
    """Return evidence where the general prompts are answered worse than before training."""
    losses = run.series(f"val/{GENERAL}/loss").finite()
    if len(losses) < 2 or losses.steps[0] != 0 or losses.values[-1] < FORGOT * losses.values[0]:
        return None
    return {"before": losses.values[0], "after": losses.values[-1], "rate": run.peak_rate}


def overfitting(run: Run) -> dict[str, Any] | None:
    """Return evidence where the last two evaluations are worse than a better one, and the training loss fell since."""
    validation, losses = run.validation, run.losses
    if len(validation) < 3 or len(losses) < MIN_STEPS:
        return None
    best = min(range(len(validation)), key=validation.values.__getitem__)
    later = validation.values[best + 1 :]
    lowest, step = validation.values[best], validation.steps[best]
    if step == 0 or len(later) < 2 or min(later[-2:]) <= lowest or later[-1] < OVERFITTED * lowest:
        return None
    curve = dict(zip(losses.steps, smooth(losses.values), strict=True))
    before = next((value for at, value in curve.items() if at >= step), losses.values[0])
    now = ends(losses.values)[1]
    if before - now < SIGNIFICANT * uncertainty(losses.values):
        return None
    return {"step": step, "best": lowest, "last": later[-1], "before": before, "now": now}


def is_repetitive(text: str) -> bool:
    """Return whether an answer ends in a phrase that occurs four times in a row, over at least half of it."""
    end = text.strip()[-LONGEST_END:]
    found = re.search(rf"(\S.{{0,79}}?)(?:\s*\1){{{REPEATS - 1},}}\S{{0,80}}$", end, re.DOTALL)
    return found is not None and len(found[0]) >= max(len(end) / 2, 3 * REPEATS)


def empty(run: Run) -> dict[str, Any] | None:
    """Return evidence where answers are empty."""
    return _habit(run, lambda sample: not sample["answer"].strip(), EMPTY)


def repeated(run: Run) -> dict[str, Any] | None:
    """Return evidence where answers repeat a phrase."""
    return _habit(run, lambda sample: is_repetitive(sample["answer"]), REPEATED)


def endless(run: Run) -> dict[str, Any] | None:
    """Return evidence where answers reach the limit although their references are shorter."""
    return _habit(run, _is_endless, ENDLESS)


def _is_endless(sample: dict[str, Any]) -> bool:
    reference = sample.get("reference") or ""
    return bool(sample.get("is_truncated") and len(sample["answer"].strip()) > len(str(reference).strip()))


def _habit(run: Run, has_it: Callable[[dict[str, Any]], bool], fraction: float) -> dict[str, Any] | None:
    """Fires where many answers have it: at the end of a run, or more than before training, which may be unlearned."""
    if not run.samples:
        return None
    first, newest = run.samples[0], run.samples[-1]
    answers = newest["samples"]
    count = sum(map(has_it, answers))
    if not newest["step"] or len(answers) < MIN_ANSWERS or count < max(MIN_HABIT, fraction * len(answers)):
        return None
    is_over = run.last_step >= (run.total_steps or 0)
    if first["step"] == 0 and not is_over and count <= sum(map(has_it, first["samples"])):
        return None
    tokens = run.setting("eval.max_new_tokens", 0)
    return {"count": count, "answers": len(answers), "step": newest["step"], "tokens": tokens}
