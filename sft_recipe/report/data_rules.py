"""Rules about the data and what it does to the machine: answers that are cut, tokens without loss, idle ranks.

A rule returns the numbers of its evidence, or None. The facts about the data are those of data.json.
"""

import statistics
from typing import Any

from sft_recipe.report.run import Run

CUT = 0.1  # fraction of the records; a few long ones are usual
DROPPED = 0.25  # fraction of the records; the rest is still most of the data
WITHOUT_END = 0.1  # fraction of the examples; a model that sees one end in ten missing runs on
FEW_SUPERVISED = 0.03  # fraction of the tokens; less is computed almost for nothing
BUSY = 0.7  # token efficiency on several ranks; batches of four on two ranks have 0.9
PADDED = 0.5  # token efficiency on one rank; micro-batches of like lengths have more
INPUT_BOUND = 0.2  # fraction of the time; a memory-mapped store needs under a hundredth
MIN_STEPS = 8  # the first steps read data that is not in memory yet


def cut_data(run: Run) -> dict[str, Any] | None:
    """Return evidence where truncation cuts answers off."""
    return _lost(run, "cut", CUT)


def dropped_data(run: Run) -> dict[str, Any] | None:
    """Return evidence where many records are too long to be used."""
    return _lost(run, "dropped", DROPPED)


def _lost(run: Run, kind: str, part: float) -> dict[str, Any] | None:
    count, records = run.data.get(kind, 0), run.data.get("records", 0)
    if not count or count < part * records:
        return None
    limit = run.setting("data.max_length", 0)
    return {"count": count, "records": records, "percent": 100 * count / records, "limit": limit}


def no_end_token(run: Run) -> dict[str, Any] | None:
    """Return evidence where the model is not trained to end its answers."""
    count, sampled = run.data.get("without_end", 0), run.data.get("sampled", 0)
    if not count or count < WITHOUT_END * sampled:
        return None
    return {"count": count, "sampled": sampled}


def few_supervised(run: Run) -> dict[str, Any] | None:
    """Return evidence where hardly any token has a loss."""
    supervised = sum(run.series("train/supervised_tokens").finite().values)
    tokens = sum(run.series("train/tokens").finite().values)
    if not tokens or supervised >= FEW_SUPERVISED * tokens:
        return None
    return {"supervised": int(supervised), "tokens": int(tokens), "percent": 100 * supervised / tokens}


def idle_ranks(run: Run) -> dict[str, Any] | None:
    """Return evidence where ranks wait for the one that has most of the batch."""
    return _wasted(run, BUSY) if run.ranks > 1 else None


def padding(run: Run) -> dict[str, Any] | None:
    """Return evidence where padding is most of what is computed."""
    return _wasted(run, PADDED)


def _wasted(run: Run, limit: float) -> dict[str, Any] | None:
    values = run.series("perf/token_efficiency").finite().values
    if len(values) < MIN_STEPS or statistics.median(values) >= limit:
        return None
    batch = run.setting("data.train_batch_size", 0)
    return {"percent": 100 * (1 - statistics.median(values)), "batch": batch, "ranks": run.ranks}


def input_bound(run: Run) -> dict[str, Any] | None:
    """Return evidence where the steps wait for their examples."""
    waiting = run.series("perf/data_seconds").finite().values[1:]
    seconds = run.series("perf/seconds").finite().values[-len(waiting) :]
    if len(waiting) < MIN_STEPS or sum(waiting) < INPUT_BOUND * sum(seconds):
        return None
    return {"percent": 100 * sum(waiting) / sum(seconds), "seconds": sum(waiting)}
