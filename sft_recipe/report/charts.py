"""Charts as inline SVG: curves over steps with few points, axes with round numbers, and the data for hovering.

A chart is 1000 x 400 units that the page stretches; strokes and text keep their size.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sft_recipe.report.curves import smooth
from sft_recipe.report.run import Series

WIDTH, HEIGHT = 1000, 400
BUCKETS = 300  # of a curve; each keeps its lowest and highest value, so that no peak is lost
LOG_RATIO = 30  # highest over median: above, a linear axis would show one peak and a flat line
ZERO_RATIO = 0.4  # lowest over highest: below, the axis begins at 0
SHOWN_GAPS = 100  # steps without a finite value that are marked
MANY = 40  # points; more are not marked one by one


@dataclass(frozen=True)
class Line:
    """A curve by its name; `color` is the number of its color. A smoothed one is drawn over its faint raw values."""

    name: str
    series: Series
    color: int = 0
    is_smoothed: bool = False

    @cached_property
    def smoothed(self) -> Series:
        """Return the running mean over the finite values."""
        finite = self.series.finite()
        return Series(finite.steps, smooth(finite.values))


@dataclass(frozen=True)
class Curve:
    """What is drawn of a series: parts between missing values, each a list of (x, y) in units of the chart.

    `kind` is raw, smooth or plain. The points of a curve with few of them `has_marks`.
    """

    kind: str
    color: int
    parts: list[list[tuple[float, float]]]
    has_marks: bool

    @property
    def path(self) -> str:
        """Return the curve as the path of an SVG; a single point is a dot, as the ends of strokes are round."""
        return "".join("M" + "L".join(f"{x:g} {y:g}" for x, y in part) + "h0" * (len(part) == 1) for part in self.parts)

    @property
    def marks(self) -> str:
        """Return the points as the path of an SVG, a stroke without length at each."""
        return "".join(f"M{x:g} {y:g}h0" for part in self.parts for x, y in part) if self.has_marks else ""


@dataclass(frozen=True)
class Axis:
    """Maps the values from `low` to `high` to 0..1; the axis is logarithmic where `is_log`."""

    low: float
    high: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return the position of a value, 0 at `low` and 1 at `high`."""
        if self.is_log:
            # A running mean beside a huge value may round to 0.
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    @cached_property
    def ticks(self) -> list[tuple[str, float]]:
        """Return three to seven round values on the axis: (text, position in percent)."""
        values = _log_ticks(self.low, self.high) if self.is_log else _linear_ticks(self.low, self.high)
        texts = [number(value) for value in values]
        if len(set(texts)) < len(texts):  # values that differ little
            texts = [f"{value:.10g}" for value in values]
        return [(text, round(100 * self.place(value), 2)) for text, value in zip(texts, values, strict=True)]


@dataclass(frozen=True)
class Chart:
    """Holds curves over steps, with one axis for all values; `level` is a horizontal line, such as a limit.

    A chart without a finite value has no axes: `drawable` says whether it has one.
    """

    title: str
    lines: list[Line]
    level: tuple[str, float] | None = None

    @property
    def drawable(self) -> bool:
        """Return whether any line has a finite value."""
        return any(len(line.series.finite()) for line in self.lines)

    @cached_property
    def steps(self) -> Axis:
        """Return the axis of the steps of all lines."""
        steps = [step for line in self.lines for step in line.series.steps]
        return Axis(min(steps), max(max(steps), min(steps) + 1))

    @cached_property
    def values(self) -> Axis:
        """Return the axis of all values: from 0 where they vary much, logarithmic where one is far above the rest."""
        values = sorted(value for line in self.lines for value in line.series.finite().values)
        if self.level:
            values = sorted([*values, self.level[1]])
        return _value_axis(values)

    @cached_property
    def curves(self) -> list[Curve]:
        """Return what is drawn, faint raw values first."""
        drawn = []
        for line in self.lines:
            if line.is_smoothed:
                drawn.append(self._curve("raw", line, line.series))
                drawn.append(self._curve("smooth", line, line.smoothed))
            else:
                drawn.append(self._curve("plain", line, line.series))
        return sorted(drawn, key=lambda curve: curve.kind != "raw")

    @property
    def gaps(self) -> list[float]:
        """Return the positions, in units, of steps whose value is not finite."""
        steps = [
            step
            for line in self.lines
            for step, value in zip(line.series.steps, line.series.values, strict=True)
            if not math.isfinite(value)
        ]
        return [self._x(step) for step in sorted(set(steps))[:SHOWN_GAPS]]

    @property
    def level_place(self) -> float | None:
        """Return the position of `level` on the axis of values, in percent."""
        return round(100 * self.values.place(self.level[1]), 2) if self.level else None

    @property
    def data(self) -> dict[str, Any]:
        """Return what the page's script needs to show the values at a step; JSON has no NaN, so it is null."""
        axis = self.values
        lines = []
        for line in self.lines:
            raw = thin(line.series)
            texts = [number(value) if math.isfinite(value) else None for value in raw.values]
            shown = line.smoothed if line.is_smoothed else None
            at = dict(zip(shown.steps, shown.values, strict=True)) if shown else {}
            means = [number(at[step]) if step in at else None for step in raw.steps] if shown else None
            places = [
                round(axis.place(at.get(step, value)), 4) if math.isfinite(value) else None
                for step, value in zip(raw.steps, raw.values, strict=True)
            ]
            lines.append(
                {"name": line.name, "color": line.color, "steps": raw.steps, "y": places, "raw": texts, "mean": means}
            )
        return {"low": self.steps.low, "high": self.steps.high, "lines": lines}

    def _curve(self, kind: str, line: Line, series: Series) -> Curve:
        parts: list[list[tuple[float, float]]] = [[]]
        points = thin(series)
        for step, value in zip(points.steps, points.values, strict=True):
            if math.isfinite(value):
                parts[-1].append((self._x(step), self._y(value)))
            elif parts[-1]:
                parts.append([])
        return Curve(kind, line.color, [part for part in parts if part], kind == "plain" and len(series) <= MANY)

    def _x(self, step: float) -> float:
        return round(WIDTH * self.steps.place(step), 1)

    def _y(self, value: float) -> float:
        return round(HEIGHT * (1 - self.values.place(value)), 1)


def thin(series: Series) -> Series:
    """Return a series with at most about two values for each of the buckets, extremes and gaps among them."""
    if len(series) <= 2 * BUCKETS:
        return series
    size = math.ceil(len(series) / BUCKETS)
    kept = {0, len(series) - 1}
    for start in range(0, len(series), size):
        places = range(start, min(start + size, len(series)))
        finite = [place for place in places if math.isfinite(series.values[place])]
        kept |= set([place for place in places if not math.isfinite(series.values[place])][:1])
        if finite:
            kept |= {min(finite, key=series.values.__getitem__), max(finite, key=series.values.__getitem__)}
    order = sorted(kept)
    return Series([series.steps[place] for place in order], [series.values[place] for place in order])


def number(value: float) -> str:
    """Return a number with four significant digits, with thousands separators or an exponent where that is short."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    size = abs(value)
    if size < 1e-3 or size >= 1e7:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.4g}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _value_axis(values: Sequence[float]) -> Axis:
    low, high, median = values[0], values[-1], values[len(values) // 2]
    if low > 0 and high > LOG_RATIO * median:
        return Axis(low / 1.1, min(high * 1.1, sys.float_info.max), is_log=True)
    if low >= 0 and low < ZERO_RATIO * high:
        return Axis(0.0, high * 1.05)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - margin, high + margin)


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [float(f"{(first + index) * step:.10g}") for index in range(count)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
    return ticks[:: math.ceil(len(ticks) / 7)] if ticks else [low, high]
