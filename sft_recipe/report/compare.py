"""Several runs side by side: their numbers, curves over each other, and the settings in which they differ."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from sft_recipe.report.benchmarks import read_benchmarks
from sft_recipe.report.charts import Chart, Line, number
from sft_recipe.report.findings import find_problems
from sft_recipe.report.page import duration, environment, metric_name, score_text
from sft_recipe.report.run import Run
from sft_recipe.report.settings import command, compare_settings, differences
from sft_recipe.report.summary import scores, summary
from sft_recipe.report.words import describe, report_translator

# key, whether it is smoothed, how it is called
CURVES = (
    ("train/loss", True, "Training loss, running mean"),
    ("val/loss", False, "Validation loss"),
    ("val/token_accuracy", False, "Token accuracy"),
    ("eval/bleu4", False, "BLEU-4"),
    ("train/lr", False, "Learning rate"),
    ("train/grad_norm", True, "Gradient norm, running mean"),
    ("perf/tokens_per_s", True, "Tokens per second, running mean"),
    ("perf/memory_gb", False, "Memory, GiB"),
)

# what decides on which data a run is validated; for data that is held out, also what they are drawn from
VALIDATION_DATA = ("data.val_files", "data.val_ratio", "eval.limit")
HELD_OUT_DATA = ("data.train_files", "trainer.seed")


@dataclass(frozen=True)
class Row:
    """One number of all runs as text, empty for a run that has none; `best` is the place of the best run, if any is."""

    name: str
    texts: list[str]
    best: int | None = None


def names(runs: list[Run]) -> list[str]:
    """Return a short name for each run: the name of its folder, with as many folders above it as are needed."""
    folders = [run.folder.resolve() for run in runs]
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        short = [str(Path(*folder.parts[-count:])) for folder in folders]
        if len(set(short)) == len(short):
            return short
    return [str(folder) for folder in folders]


def results(runs: list[Run], language: str = "en") -> list[Row]:
    """Return the numbers of the runs, one row each; the newest evaluation counts.

    Scores on different validation data are easier or harder to reach, so that none of them is the best.
    """
    translate = report_translator(language)
    facts = [summary(run) for run in runs]
    rows = [
        Row(translate("Model"), [str(fact["model"]) for fact in facts]),
        Row(translate("Steps"), [_steps(fact) for fact in facts]),
        _row(_loss_name(facts, translate), [fact["train_loss"]["last"] for fact in facts], min, number),
    ]
    found = [{score.key: score for score in scores(run)} for run in runs]
    is_comparable = not _validation_differs(runs)
    for key in dict.fromkeys(key for one in found for key in one):
        values = [one[key].last if key in one else None for one in found]
        is_lower_better = next(one[key].is_lower_better for one in found if key in one)

        def text(value: float, key: str = key) -> str:
            return score_text(value, key)

        row = _row(metric_name(key, translate), values, min if is_lower_better else max, text)
        rows.append(row if is_comparable else replace(row, best=None))
    rows += _benchmark_rows(runs)
    rows.append(_row(translate("Tokens per second"), [fact["tokens_per_s"] for fact in facts], max, number))
    rows.append(_row(translate("Memory, GiB"), [fact["memory_gb"] for fact in facts], min, number))
    seconds = [fact["seconds"] for fact in facts]
    rows.append(Row(translate("Time"), [duration(value, translate) if value else "" for value in seconds]))
    return [row for row in rows if any(row.texts)]


def remark(runs: list[Run], language: str = "en") -> str:
    """Return a sentence that says why no run is the best by the scores of the validation, "" where one can be."""
    translate = report_translator(language)
    text = translate("The runs were validated on different data, so no run is marked as the best by these scores.")
    return text if _validation_differs(runs) else ""


def comparison_page(runs: list[Run], language: str = "en") -> str:
    """Return the page that compares runs as HTML, in English or Chinese."""
    translate = report_translator(language)
    short = names(runs)
    return environment(language).get_template("comparison.html").render(
        names=short,
        runs=runs,
        results=results(runs, language),
        remark=remark(runs, language),
        charts=[chart for chart in _charts(runs, short, translate) if chart.drawable],
        settings=compare_settings(runs),
        findings=[[describe(finding, language) for finding in find_problems(run)] for run in runs],
        commands=[command(run) for run in runs],
    )  # fmt: skip


def as_json(runs: list[Run], language: str = "en") -> dict[str, Any]:
    """Return everything that the pages show, except curves, as plain values; inf and nan are texts, as in YAML."""
    found = [
        {
            "folder": str(run.folder),
            "summary": summary(run),
            "benchmarks": [asdict(one) for one in read_benchmarks(run.folder)],
            "findings": [describe(finding, language) for finding in find_problems(run)],
            "settings": {key: value for key, (value, _) in differences(run).items()},
            "command": command(run),
        }
        for run in runs
    ]
    compared = {"differences": compare_settings(runs)} if len(runs) > 1 else {}
    return cast(dict[str, Any], _without_nonfinite({"runs": found} | compared))


def _without_nonfinite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(key): _without_nonfinite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_nonfinite(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree


def _charts(runs: list[Run], short: list[str], translate: Callable[[str], str]) -> list[Chart]:
    charts = []
    for key, is_smoothed, title in CURVES:
        lines = [Line(name, run.series(key), place) for place, (name, run) in enumerate(zip(short, runs, strict=True))]
        shown = [Line(line.name, line.smoothed, line.color) if is_smoothed else line for line in lines]
        charts.append(Chart(translate(title), [line for line in shown if len(line.series)]))
    return charts


def _validation_differs(runs: list[Run]) -> bool:
    """Whether the settings select different validation data, or files of one name had other tokens."""
    validated = [run for run in runs if scores(run)]
    if len(validated) < 2:
        return False
    is_held_out = any(run.setting("data.val_ratio", 0.0) for run in validated)
    differing = compare_settings(validated).keys()
    tokens = {values[-1] for run in validated if (values := run.series("val/tokens").finite().values)}
    return len(tokens) > 1 or not differing.isdisjoint(VALIDATION_DATA + (HELD_OUT_DATA if is_held_out else ()))


def _benchmark_rows(runs: list[Run]) -> list[Row]:
    """The scores of the newest checkpoint that has them; whether a higher one is better depends on the task."""
    found = [{f"{one.task}, {one.metric}": number(one.value) for one in read_benchmarks(run.folder)} for run in runs]
    return [
        Row(name, [one.get(name, "") for one in found]) for name in dict.fromkeys(key for one in found for key in one)
    ]


def _row(
    name: str, values: list[float | None], choose: Callable[..., float], text: Callable[[float], str]
) -> Row:  # fmt: skip
    known = [value for value in values if value is not None]
    is_decided = len(known) > 1 and len(set(known)) > 1
    best = values.index(choose(known)) if is_decided else None
    return Row(name, ["" if value is None else text(value) for value in values], best)


def _loss_name(facts: list[dict[str, Any]], translate: Callable[[str], str]) -> str:
    """The name of the training loss with the number of steps whose mean it is, where that is one number."""
    counts = {count for fact in facts if (count := fact["train_loss"]["mean_of"])}
    if counts <= {1}:
        return translate("Training loss")
    if len(counts) > 1:
        return translate("Training loss, mean of the last steps")
    return translate("Training loss, mean of the last {count} steps").format(count=counts.pop())


def _steps(fact: dict[str, Any]) -> str:
    return f"{fact['step']:,}" + (f" / {fact['total_steps']:,}" if fact["total_steps"] else "")
