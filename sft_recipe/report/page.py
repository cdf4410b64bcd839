"""A run as one self-contained HTML page: no network, one small script, and all text escaped."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment

from sft_recipe.display import page_environment, percent, printable
from sft_recipe.language import fill
from sft_recipe.report.benchmarks import read_benchmarks
from sft_recipe.report.charts import Chart, Line, number
from sft_recipe.report.findings import find_problems, success
from sft_recipe.report.run import Run
from sft_recipe.report.settings import command, differences
from sft_recipe.report.summary import Score, scores, summary
from sft_recipe.report.words import SUCCESS, describe, report_translator

SHOWN_SAMPLES = 12
LONGEST_TEXT = 2000  # characters of a prompt or an answer
SHOWN_EVALUATIONS = 40  # rows of the table: the first, the last, and those between at equal distances
NAMES = {
    "val/loss": "Validation loss",
    "val/perplexity": "Perplexity",
    "val/token_accuracy": "Token accuracy",
    "eval/bleu4": "BLEU-4",
    "eval/rouge_l": "ROUGE-L",
    "eval/exact_match": "Exact match",
    "eval/tool_match": "Tool calls right",
    "eval/truncated": "Answers cut off",
    "eval/empty": "Empty answers",
}
DATA_COUNTS = {
    "examples": "Examples",
    "tokens": "Tokens",
    "repeated": "Repeated examples",
    "dropped": "Left out: longer than the limit",
    "cut": "Cut off: longer than the limit",
    "without_target": "Left out: no supervised token",
}
FRACTIONS = ("token_accuracy", "exact_match", "tool_match")  # shown in percent

DECIMALS = {"loss": 3, "perplexity": 2, "bleu4": 1, "rouge_l": 3}


def run_page(run: Run, language: str = "en") -> str:
    """Return the report of a run as HTML, in English or Chinese."""
    translate = report_translator(language)
    facts = summary(run)
    reached = success(run)
    found = scores(run)
    return environment(language).get_template("run.html").render(
        run=run,
        facts=facts,
        data=_data_rows(run.data, translate),
        tiles=list(_tiles(facts, found, translate)),
        findings=[describe(finding, language) for finding in find_problems(run)],
        success=fill(translate(SUCCESS), **reached) if reached else "",
        charts=[chart for chart in _charts(run, facts, found, translate) if chart.drawable],
        scores=[(metric_name(score.key, translate), score) for score in found],
        evaluations=_evaluations(run, found),
        best_step=_best_step(run, found),
        benchmarks=read_benchmarks(run.folder),
        pairs=_pairs(run),
        differences=differences(run),
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        command=command(run),
    )  # fmt: skip


@lru_cache(maxsize=2)
def environment(language: str) -> Environment:
    """Return the environment of the templates, which translate their texts by `t`."""
    script = files("sft_recipe.report").joinpath("templates/charts.js").read_text(encoding="utf-8")
    translate = report_translator(language)
    made = page_environment("sft_recipe.report", "templates", language, translate, script)
    made.filters |= {"num": _text, "value": _setting, "lines": _lines, "excerpt": _excerpt, "score": score_text}
    made.filters |= {
        "described": lambda line: _described(line, translate),
        "duration": lambda s: duration(s, translate),
    }
    return made


def score_text(value: float, key: str) -> str:
    """Return a score as text: fractions in percent, the others with the decimals that are usual for them."""
    metric = key.rpartition("/")[2]
    if metric in FRACTIONS:
        return f"{100 * value:.1f}%"
    return f"{value:,.{DECIMALS[metric]}f}" if metric in DECIMALS and abs(value) < 1e6 else number(value)


def loss_chart(run: Run, translate: Callable[[str], str]) -> Chart:
    """Return the chart of the training loss and of all validation losses; it is drawable where any is finite."""
    validation = [score for score in scores(run) if score.key.startswith("val/") and score.key.endswith("/loss")]
    kind = translate("validation")
    lines = [Line(translate("training"), run.series("train/loss"), 0, is_smoothed=True)]
    for color, score in enumerate(validation, 1):
        name = score.key.split("/")[1] if score.key.count("/") > 1 else ""
        lines.append(Line(f"{kind} {name}".strip(), run.series(score.key), color))
    return Chart(translate("Loss"), [line for line in lines if len(line.series)])


def _charts(run: Run, facts: dict[str, Any], found: list[Score], translate: Callable[[str], str]) -> list[Chart]:
    limit, predicted = run.setting("optim.clip_grad", 0.0), facts["predicted_memory_gb"]

    def chart(title: str, key: str, is_smoothed: bool = False, level: tuple[str, float] | None = None) -> Chart:
        name = translate(title)
        series = run.series(key)
        return Chart(name, [Line(name, series, 0, is_smoothed)] if len(series) else [], level)

    several = [score for score in found if len(score.series) > 1]
    metrics = [score for score in several if score.key in ("val/token_accuracy", "eval/bleu4", "eval/rouge_l")]
    return [
        loss_chart(run, translate),
        chart("Learning rate", "train/lr"),
        chart("Gradient norm", "train/grad_norm", True, ("GRAD_CLIP", float(limit)) if limit else None),
        chart("Tokens per second", "perf/tokens_per_s", True),
        chart("Memory, GiB", "perf/memory_gb", level=(translate("predicted"), predicted) if predicted else None),
        *(chart(NAMES[score.key], score.key) for score in metrics),
    ]


def _tiles(facts: dict[str, Any], found: list[Score], t: Callable[[str], str]) -> Iterable[dict[str, Any]]:
    loss = facts["train_loss"]
    if loss["last"] is not None:
        count, first = loss["mean_of"], number(loss["first"])
        mean = t("mean of the last {count} steps; {value} in the first {count}").format(count=count, value=first)
        note = mean if count > 1 else _before(loss["first"], t)
        yield {"name": t("Training loss"), "value": number(loss["last"]), "note": note, "kind": ""}
    shown = ("val/loss", "val/token_accuracy", "eval/bleu4")
    for score in found:
        if score.key in shown:
            before, after = (score_text(value, score.key) for value in (score.first, score.last))
            kind = "bad" if (score.last > score.first) == score.is_lower_better else "good"
            yield {
                "name": metric_name(score.key, t),
                "value": after,
                "note": _before(before, t) if len(score.series) > 1 else "",
                "kind": kind if after != before else "",
            }
    if facts["tokens_per_s"]:
        note = t("{tokens} tokens in all").format(tokens=number(facts["tokens"])) if facts["tokens"] else ""
        yield {"name": t("Tokens per second"), "value": number(facts["tokens_per_s"]), "note": note, "kind": ""}
    if facts["memory_gb"]:
        predicted = facts["predicted_memory_gb"]
        note = t("predicted {size} GiB").format(size=number(predicted)) if predicted else ""
        yield {"name": t("Memory, GiB"), "value": number(facts["memory_gb"]), "note": note, "kind": ""}


def _data_rows(data: dict[str, Any], t: Callable[[str], str]) -> list[tuple[str, str]]:
    """The statistics of the training data as rows (name, text), those that the run folder has."""
    rows = [(t(name), f"{data[key]:,}") for key, name in DATA_COUNTS.items() if data.get(key)]
    if data.get("supervised") and data.get("tokens"):
        rows.append(
            (t("Supervised tokens"), f"{data['supervised']:,} ({percent(data['supervised'] / data['tokens'])})")
        )
    if lengths := data.get("lengths"):
        texts = {key: f"{lengths.get(key, 0):,}" for key in ("median", "p95", "max")}
        rows.append((t("Length in tokens"), t("median {median}, p95 {p95}, longest {max}").format(**texts)))
    if data.get("without_end"):
        text = t("{count} of {total}").format(count=f"{data['without_end']:,}", total=f"{data.get('sampled', 0):,}")
        rows.append((t("Without a supervised end token"), text))
    return rows


def _before(value: Any, translate: Callable[[str], str]) -> str:
    return translate("{value} at the start").format(value=_text(value))


def metric_name(key: str, translate: Callable[[str], str]) -> str:
    """Return the name of a metric; that of a named set comes behind it: Validation loss, zh."""
    parts = key.split("/")
    name = translate(NAMES.get(f"{parts[0]}/{parts[-1]}", parts[-1]))
    return f"{name}, {parts[1]}" if len(parts) > 2 else name


def _evaluations(run: Run, found: list[Score]) -> list[dict[str, Any]]:
    keys = [score.key for score in found]
    rows = [row for row in run.rows if any(key in row for key in keys)]
    distance = max(1, -(-len(rows) // SHOWN_EVALUATIONS))
    kept = {*range(0, len(rows), distance), len(rows) - 1}
    return [rows[place] for place in sorted(kept) if rows]


def _best_step(run: Run, found: list[Score]) -> int | None:
    """The step of the best evaluation after the first step, by the metric that checkpoints/best compares."""
    metric, mode = run.setting("trainer.early_stopping.metric", "val/loss"), run.setting("trainer.early_stopping.mode")
    score = next((score for score in found if score.key == metric), None)
    pairs = [pair for pair in zip(score.series.steps, score.series.values, strict=True) if pair[0]] if score else []
    if not pairs:
        return None
    return (max if mode == "max" else min)(pairs, key=lambda pair: pair[1])[0]


def _pairs(run: Run) -> dict[str, Any]:
    """The answers of the first and of the newest evaluation, side by side."""
    if not run.samples:
        return {"total": 0, "shown": []}
    first, last = run.samples[0], run.samples[-1]
    before = {_prompt(sample): sample for sample in first["samples"]} if first is not last else {}
    empty = {"prompt": "", "reference": None, "is_truncated": False}
    shown = [{"after": empty | sample, "before": before.get(_prompt(sample))} for sample in last["samples"]]
    return {"total": len(shown), "shown": shown[:SHOWN_SAMPLES], "first": first["step"], "last": last["step"]}


def _prompt(sample: dict[str, Any]) -> tuple[str, str]:
    return str(sample.get("set")), str(sample.get("prompt"))


def _text(value: Any) -> str:
    """A number or a text; an absent one is a dash."""
    if value is None:
        return "–"
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _described(line: Line, translate: Callable[[str], str]) -> str:
    """A curve in words, for people who do not see it."""
    finite = line.series.finite()
    if not len(finite):
        return translate("not finite")
    text = translate("from {first} at step {begin} to {last} at step {end}, lowest {low}, highest {high}")
    first, last = number(finite.values[0]), number(finite.values[-1])
    low, high = number(min(finite.values)), number(max(finite.values))
    return text.format(first=first, begin=finite.steps[0], last=last, end=finite.steps[-1], low=low, high=high)


def duration(seconds: float, translate: Callable[[str], str]) -> str:
    """Return a duration as text: 45 s, 12 min, 3 h 20 min."""
    if seconds < 120:
        return translate("{count} s").format(count=f"{seconds:.0f}")
    hours, minutes = divmod(round(seconds / 60), 60)
    if not hours:
        return translate("{count} min").format(count=minutes)
    return translate("{hours} h {minutes} min").format(hours=f"{hours:,}", minutes=minutes)


def _setting(value: Any) -> str:
    """A setting as YAML writes it on one line."""
    if isinstance(value, str):
        return printable(value)
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return printable(text.removesuffix("\n").removesuffix("\n..."))


def _excerpt(text: Any) -> str:
    """A long text without its middle: prompts begin with their topic and end with the question."""
    shown, half = str(text), LONGEST_TEXT // 2
    return _lines(shown if len(shown) <= LONGEST_TEXT else f"{shown[:half]}\n[…]\n{shown[-half:]}")


def _lines(text: Any) -> str:
    """Text of several lines, with visible symbols for control characters."""
    return "\n".join(printable(line) for line in str(text).split("\n"))
