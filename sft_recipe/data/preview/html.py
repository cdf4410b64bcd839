"""Renders a preview as one self-contained HTML page: no network, no scripts, and all data is escaped."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from markupsafe import Markup

from sft_recipe.data.messages import Conversation
from sft_recipe.data.pretokenized import TokenizedRecord
from sft_recipe.data.preview import chinese, terminal
from sft_recipe.data.preview.stats import DatasetStats, Example
from sft_recipe.data.preview.terminal import Part, Token, cycles, rejected_kinds, tokens_of, visible
from sft_recipe.data.rendering.renderer import Renderer
from sft_recipe.display import page_environment, printable
from sft_recipe.language import translator

BARS = 48  # the most bars in the histogram of lengths
PERCENT_BARS = 20  # bars in the histogram of percentages
PATTERNS = 5  # how many role patterns are listed
FOLD_TOKENS, FOLD_LINES = 400, 16  # longer conversations are folded
EXCERPT = 140  # characters


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram: the number of records within the limit and, above it, of those over the limit."""

    label: str
    within: int
    over: int = 0


@dataclass(frozen=True)
class Histogram:
    """Bars of equal width from 0 to `end`; the last bar includes values up to `beyond`, if that is not None.

    `ticks` are (value, position on the axis in percent). `limit` is the position of MAX_LENGTH in percent, None if it
    is not on the axis.
    """

    bars: list[Bar]
    end: int
    ticks: list[tuple[int, float]]
    limit: float | None = None
    beyond: int | None = None

    @property
    def highest(self) -> int:
        """Return the number of records in the highest bar."""
        return max((bar.within + bar.over for bar in self.bars), default=0)


def page(
    stats: DatasetStats,
    renderer: Renderer,
    data: str,
    model: str,
    excerpts: dict[str, str] | None = None,
    language: str = "en",
) -> str:
    """Return the HTML page. `data` and `model` are names for the title; `excerpts` has texts of duplicates."""
    t = translator(language, chinese.CHINESE)
    words = chinese if language == "zh" else terminal
    environment = page_environment("sft_recipe.data", "preview", language, t)
    environment.filters |= {"plural": words.plural}
    template = environment.get_template("page.html")
    repeats, duplicates = stats.duplicates()
    lengths, supervised, truncation = stats.lengths, stats.supervised, stats.truncation()
    # An encoder-decoder has two limits, so that no length divides the records.
    limit = stats.settings.max_length if stats.settings.max_target_length is None else None
    return template.render(
        data=data,
        model=model,
        settings=stats.settings,
        stats=stats,
        tokens=int(lengths.sum()),
        supervised=int(supervised.sum()),
        quantiles=_quantiles(lengths),
        longest=int(lengths.max()),
        characters=_quantiles(stats.characters) if stats.characters.any() else {},
        repeats=repeats,
        duplicates=duplicates,
        excerpts=excerpts or {},
        truncation=truncation,
        packing=stats.packing(),
        mix=words.mixture_text(truncation.sources),
        kinds=rejected_kinds(stats),
        lengths=length_histogram(lengths, truncation.is_too_long, limit),
        percentages=percent_histogram(supervised / lengths),
        patterns=_patterns(stats),
        conversations=[_conversation(example, stats, renderer, words) for example in stats.sample],
        extremes=[
            ("longest", t("Longest records"), [_row(example) for example in stats.longest]),
            ("least-supervised", t("Fewest supervised tokens"), [_row(example) for example in stats.least_supervised]),
        ],
    )


def _quantiles(sizes: np.ndarray) -> dict[str, int]:
    values = np.percentile(sizes, [50, 95, 100], method="lower").tolist()
    return dict(zip(("median", "p95", "max"), values, strict=True))


def length_histogram(lengths: np.ndarray, is_too_long: np.ndarray, limit: int | None) -> Histogram:
    """Return the histogram of lengths in tokens; very long records share the last bar, so that the others stay wide.

    `is_too_long` marks the records over a limit, and `limit` is MAX_LENGTH where that divides them by length.
    """
    longest, p95 = int(lengths.max()), int(np.percentile(lengths, 95, method="lower"))
    top = longest if longest <= 3 * p95 else 2 * p95
    width = _round_width(top / BARS)
    count = math.ceil((top + 1) / width)
    bins = np.minimum(lengths // width, count - 1)
    within, over = (np.bincount(bins[chosen], minlength=count).tolist() for chosen in (~is_too_long, is_too_long))
    labels = [f"{index * width:,}–{(index + 1) * width - 1:,}" for index in range(count)]
    end = count * width
    beyond = longest if longest >= end else None
    if beyond:
        labels[-1] = f"{end - width:,}–{longest:,}"
    step = _round_width(end / 6)
    ticks = [(value, 100 * value / end) for value in range(0, end, step) if value <= (0.8 if beyond else 0.97) * end]
    # An example of exactly the limit is trained on.
    position = None if limit is None or limit >= end else 100 * (limit + 1) / end
    bars = [Bar(*values) for values in zip(labels, within, over, strict=True)]
    return Histogram(bars, end, ticks, position, beyond)


def percent_histogram(fractions: np.ndarray) -> Histogram:
    """Return the histogram of the fraction of supervised tokens in each record."""
    bins = np.minimum((fractions * PERCENT_BARS).astype(np.int64), PERCENT_BARS - 1)
    counts = np.bincount(bins, minlength=PERCENT_BARS).tolist()
    step = 100 // PERCENT_BARS
    bars = [Bar(f"{index * step}–{(index + 1) * step}", count) for index, count in enumerate(counts)]
    return Histogram(bars, 100, [(value, float(value)) for value in range(0, 100, 25)])


def excerpt(record: Conversation | TokenizedRecord) -> str:
    """Return the start of a conversation: the first words of the user, then of the assistant; "" for token ids."""
    contents = {message.role: message.content for message in reversed(record.messages)}
    return " → ".join(_short(contents[role]) for role in ("user", "assistant") if contents.get(role, "").strip())


def _short(text: str) -> str:
    text = printable(" ".join(text.split()))
    return text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…"


def _round_width(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is at least this."""
    power = 10 ** math.floor(math.log10(max(least, 1)))
    return next(int(power * step) for step in (1, 2, 5, 10) if power * step >= least)


def _patterns(stats: DatasetStats) -> list[dict[str, Any]]:
    common = stats.patterns.most_common(PATTERNS)
    return [
        {"cycles": list(cycles(roles)), "count": count, "fraction": count / stats.records} for roles, count in common
    ]


def _row(example: Example) -> dict[str, Any]:
    return {
        "tokens": example.tokens,
        "supervised": example.supervised,
        "fraction": example.supervised / example.tokens,
        "source": example.record.source,
        "excerpt": excerpt(example.record),
    }


def _conversation(example: Example, stats: DatasetStats, renderer: Renderer, words: Any) -> dict[str, Any]:
    settings = stats.settings
    tokens = tokens_of(example, renderer, settings.longest)
    return {
        "source": example.record.source,
        "counts": words.counts_line(example, settings).partition(";")[0],
        "warning": words.too_long(example, settings),
        "fraction": example.supervised / example.tokens,
        "is_folded": len(tokens) > FOLD_TOKENS or sum(token.text.count("\n") for token in tokens) > FOLD_LINES,
        "html": _markup(visible(tokens)),
        "more": words.more_tokens(example, settings.longest),
    }


def _markup(shown: Iterable[tuple[Token, list[Part]]]) -> Markup:
    """Tokens as elements, in a span for each run of one kind; Markup escapes all text."""
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
