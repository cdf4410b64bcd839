"""What is wrong with a run: rules over its metrics, configuration, data and answers, each with its evidence."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sft_recipe.report import curve_rules, data_rules, outcome_rules
from sft_recipe.report.curves import ends
from sft_recipe.report.run import Run

MOST = 5  # findings that are shown; more of them have the same cause
SUCCESS_BLEU = 15.0  # with a loss below curve_rules.SUCCESS_LOSS known to give good answers


@dataclass(frozen=True)
class Finding:
    """A problem by the name of its rule, with the numbers of its evidence; `describe` in words.py makes sentences."""

    rule: str
    evidence: dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """`check` returns the evidence, or None. Of the rules with one topic only the first that fires is reported."""

    name: str
    topic: str
    check: Callable[[Run], dict[str, Any] | None]


def find_problems(run: Run) -> list[Finding]:
    """Return the most serious problems first, at most five, none where all is well."""
    found: dict[str, Finding] = {}
    for rule in RULES:
        if rule.topic not in found and (evidence := rule.check(run)) is not None:
            found[rule.topic] = Finding(rule.name, evidence)
    return list(found.values())[:MOST]


def success(run: Run) -> dict[str, Any] | None:
    """Return loss and BLEU-4 of a run that reached both goals, else None."""
    losses, bleu = run.losses, run.series("eval/bleu4").finite()
    if not losses or not bleu:
        return None
    loss = ends(losses.values)[1]
    reached = loss < curve_rules.SUCCESS_LOSS and bleu.values[-1] > SUCCESS_BLEU
    return {"loss": loss, "bleu": bleu.values[-1]} if reached else None


# In the order of their weight: what makes a model useless, then why it does not learn, then what it learned.
RULES = (
    Rule("nonfinite", "divergence", curve_rules.nonfinite),
    Rule("exploded", "divergence", curve_rules.exploded),
    Rule("rising", "divergence", curve_rules.rising),
    Rule("oscillating", "divergence", curve_rules.oscillating),
    Rule("short_warmup", "divergence", curve_rules.short_warmup),
    Rule("cut_data", "data", data_rules.cut_data),
    Rule("no_end_token", "data", data_rules.no_end_token),
    Rule("dropped_data", "data", data_rules.dropped_data),
    Rule("long_warmup", "progress", curve_rules.long_warmup),
    Rule("few_supervised", "progress", data_rules.few_supervised),
    Rule("large_batch", "progress", curve_rules.large_batch),
    Rule("low_rate", "progress", curve_rules.low_rate),
    Rule("flat_high", "progress", curve_rules.flat_high),
    Rule("flat", "progress", curve_rules.flat),
    Rule("slow", "progress", curve_rules.slow),
    Rule("overfitting", "generalization", outcome_rules.overfitting),
    Rule("high_rate", "generalization", outcome_rules.high_rate),
    Rule("forgetting", "generalization", outcome_rules.forgetting),
    Rule("worse_than_before", "generalization", outcome_rules.worse_than_before),
    Rule("empty", "answers", outcome_rules.empty),
    Rule("repeated", "answers", outcome_rules.repeated),
    Rule("endless", "answers", outcome_rules.endless),
    Rule("clipped", "efficiency", curve_rules.clipped),
    Rule("idle_ranks", "efficiency", data_rules.idle_ranks),
    Rule("padding", "efficiency", data_rules.padding),
    Rule("input_bound", "efficiency", data_rules.input_bound),
)
