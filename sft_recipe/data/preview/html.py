"""A preview as one self-contained HTML page: no network, no scripts, and nothing in the data can become markup."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sft_recipe.data.messages import Conversation
from sft_recipe.data.preview.stats import DatasetStats, Example
from sft_recipe.data.preview.terminal import (
    Part,
    Token,
    counted,
    counts_line,
    cycles,
    kinds,
    mixed,
    more_tokens,
    printable,
    tokens_of,
    too_long,
    visible,
)
from sft_recipe.data.rendering.renderer import Renderer

BARS = 48  # at most, in the histogram of lengths
SHARES = 20  # bars of the histogram of shares: 5% each
PATTERNS = 5
TALL = 400, 16  # tokens and lines from which on a conversation is folded
EXCERPT = 140


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram: the part that is trained on and, above it, the part over the limit, in records."""

    label: str
    within: int
    over: int = 0


@dataclass(frozen=True)
class Histogram:
    """Bars of equal width from 0 to `end`; the last holds all up to `beyond` too, where that is given.

    `ticks` are (value, place in percent); `limit` is a place as well, None where it is not on the axis.
    """

    bars: list[Bar]
    end: int
    ticks: list[tuple[int, float]]
    limit: float | None = None
    beyond: int | None = None

    @property
    def highest(self) -> int:
        return max((bar.within + bar.over for bar in self.bars), default=0)


def page(stats: DatasetStats, renderer: Renderer, data: str, model: str, excerpts: dict[str, str] | None = None) -> str:
    """The page. `data` and `model` are for the title; `excerpts` are texts of repeated records, by their place."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"n": "{:,}".format, "percent": _percent, "clean": printable, "counted": counted}
    template = environment.from_string(
        files("sft_recipe.data.preview").joinpath("page.html").read_text(encoding="utf-8")
    )
    repeats, repeated = stats.duplicates()
    lengths, supervised = stats.lengths, stats.supervised
    return template.render(
        data=data,
        model=model,
        settings=stats.settings,
        stats=stats,
        tokens=int(lengths.sum()),
        supervised=int(supervised.sum()),
        quantiles=dict(
            zip(("median", "high"), np.percentile(lengths, [50, 95], method="higher").tolist(), strict=True)
        ),
        longest=int(lengths.max()),
        repeats=repeats,
        repeated=repeated,
        excerpts=excerpts or {},
        truncation=stats.truncation(),
        packing=stats.packing(),
        mix=mixed(stats.truncation().sources),
        kinds=kinds(stats),
        lengths=length_histogram(lengths, stats.settings.max_length),
        shares=share_histogram(supervised / lengths),
        patterns=_patterns(stats),
        conversations=[_conversation(example, stats, renderer) for example in stats.sample],
        extremes=[
            ("longest", "Longest records", [_row(example) for example in stats.longest]),
            ("emptiest", "Fewest supervised tokens", [_row(example) for example in stats.emptiest]),
        ],
    )


def length_histogram(lengths: np.ndarray, limit: int) -> Histogram:
    """Of round bar widths; a few very long records share the last bar, so that the others keep their shape."""
    longest, usual = int(lengths.max()), int(np.percentile(lengths, 95, method="higher"))
    top = longest if longest <= 3 * usual else 2 * usual
    width = _round_width(top / BARS)
    count = math.ceil((top + 1) / width)
    bins = np.minimum(lengths // width, count - 1)
    is_over = lengths > limit
    within, over = (np.bincount(bins[chosen], minlength=count).tolist() for chosen in (~is_over, is_over))
    labels = [f"{index * width:,}–{(index + 1) * width - 1:,} tokens" for index in range(count)]
    end = count * width
    beyond = longest if longest >= end else None
    if beyond:
        labels[-1] = f"{end - width:,}–{longest:,} tokens"
    step = _round_width(end / 6)
    ticks = [(value, 100 * value / end) for value in range(0, end, step) if value <= (0.8 if beyond else 0.97) * end]
    # A length of exactly the limit is still trained on.
    place = 100 * (limit + 1) / end
    bars = [Bar(*values) for values in zip(labels, within, over, strict=True)]
    return Histogram(bars, end, ticks, place if place <= 100 else None, beyond)


def share_histogram(fractions: np.ndarray) -> Histogram:
    """Of the share of supervised tokens in each record."""
    bins = np.minimum((fractions * SHARES).astype(np.int64), SHARES - 1)
    counts = np.bincount(bins, minlength=SHARES).tolist()
    step = 100 // SHARES
    bars = [Bar(f"{index * step}–{(index + 1) * step}% supervised", count) for index, count in enumerate(counts)]
    return Histogram(bars, 100, [(value, float(value)) for value in range(0, 100, 25)])


def excerpt(conversation: Conversation) -> str:
    """How a conversation begins: the first words of the user, then of the assistant."""
    said = {message.role: message.content for message in reversed(conversation.messages)}
    return " → ".join(_short(said[role]) for role in ("user", "assistant") if said.get(role, "").strip())


def _short(text: str) -> str:
    text = printable(" ".join(text.split()))
    return text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…"


def _round_width(least: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = 10 ** math.floor(math.log10(max(least, 1)))
    return next(int(power * step) for step in (1, 2, 5, 10) if power * step >= least)


def _percent(share: float) -> str:
    """Never 0% of something, nor 100% where something is missing."""
    if 0 < share < 0.001 or 0.999 < share < 1:
        return "<0.1%" if share < 0.5 else ">99.9%"
    return f"{100 * share:.1f}%" if 0 < share < 0.1 or 0.99 < share < 1 else f"{100 * share:.0f}%"


def _patterns(stats: DatasetStats) -> list[dict[str, Any]]:
    common = stats.patterns.most_common(PATTERNS)
    return [{"cycles": list(cycles(roles)), "count": count, "share": count / stats.records} for roles, count in common]


def _row(example: Example) -> dict[str, Any]:
    return {
        "tokens": example.tokens,
        "supervised": example.supervised,
        "share": example.supervised / example.tokens,
        "place": example.conversation.source,
        "excerpt": excerpt(example.conversation),
    }


def _conversation(example: Example, stats: DatasetStats, renderer: Renderer) -> dict[str, Any]:
    settings = stats.settings
    tokens = tokens_of(example, renderer, settings.max_length)
    return {
        "place": example.conversation.source,
        "counts": counts_line(example, settings).partition(";")[0],
        "warning": too_long(example, settings) if example.tokens > settings.max_length else "",
        "share": example.supervised / example.tokens,
        "is_tall": len(tokens) > TALL[0] or sum(token.text.count("\n") for token in tokens) > TALL[1],
        "html": _markup(visible(tokens)),
        "more": more_tokens(example, settings.max_length),
    }


def _markup(shown: Iterable[tuple[Token, list[Part]]]) -> Markup:
    """Runs of one kind around tokens around text; every text is escaped by Markup."""
    html = []
    for (is_supervised, is_special), run in groupby(shown, key=lambda item: item[0].kind):
        inner = [
            Markup('<i title="{}">{}</i>').format(
                " ".join(map(str, token.ids)),
                Markup("").join(Markup("<u>{}</u>").format(part.text) if part.is_mark else part.text for part in parts),
            )
            for token, parts in run
        ]
        names = "s" * is_supervised + " x" * is_special
        html.append(Markup('<span class="{}">{}</span>').format(names.strip() or "c", Markup("").join(inner)))
    return Markup("").join(html)
