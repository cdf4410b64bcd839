"""Charts: where values are drawn, what survives when most points are left out, and round numbers at the axes."""

import math
import random

import pytest

from sft_recipe.report.charts import BUCKETS, HEIGHT, WIDTH, Axis, Chart, Line, number, thin
from sft_recipe.report.run import Series


def series(*values: float, start: int = 1) -> Series:
    return Series(list(range(start, start + len(values))), list(values))


def test_a_long_curve_keeps_its_ends_extremes_and_gaps():
    generator = random.Random(0)
    values = [generator.gauss(2, 0.1) for _ in range(100_000)]
    values[33_333], values[70_001], values[50_000] = 900.0, -5.0, math.nan
    thinned = thin(series(*values))
    assert len(thinned) <= 3 * BUCKETS + 5
    kept = dict(zip(thinned.steps, thinned.values, strict=True))
    assert kept[33_334] == 900 and kept[70_002] == -5 and math.isnan(kept[50_001])
    assert thinned.steps == sorted(thinned.steps) and {1, 100_000} <= set(thinned.steps)
    assert all(kept[step] == values[step - 1] or math.isnan(kept[step]) for step in kept)


def test_a_short_curve_is_drawn_completely_and_in_place():
    chart = Chart("loss", [Line("loss", series(3.0, 1.0, 2.0))])
    (curve,) = chart.curves
    low, high = chart.values.low, chart.values.high
    expected = [(place, (high - value) / (high - low)) for place, value in ((0, 3.0), (0.5, 1.0), (1, 2.0))]
    (part,) = curve.parts
    for (x, y), (across, down) in zip(part, expected, strict=True):
        assert x == pytest.approx(across * WIDTH) and y == pytest.approx(down * HEIGHT, abs=0.06)


def test_a_missing_value_interrupts_the_curve_and_is_marked():
    chart = Chart("loss", [Line("loss", series(1.0, 2.0, math.nan, 1.5, math.inf))])
    assert [len(part) for part in chart.curves[0].parts] == [2, 1]
    assert chart.gaps == [500.0, 1000.0]
    assert chart.data["lines"][0]["y"][2] is None and chart.data["lines"][0]["raw"][2] is None


def test_smoothed_values_are_drawn_over_the_raw_ones():
    values = [float(step % 2) + 1 for step in range(80)]
    raw, smooth = Chart("loss", [Line("loss", series(*values), is_smoothed=True)]).curves
    assert (raw.kind, smooth.kind) == ("raw", "smooth")
    spread = [max(y for _, y in curve.parts[0]) - min(y for _, y in curve.parts[0]) for curve in (raw, smooth)]
    assert spread[1] < spread[0] / 5


@pytest.mark.parametrize(
    ("values", "is_log"), [((2.0, 1.0), False), ((1.0, 1.2, 900.0), True), ((1e-5, 0.0), False), ((-1.0, 5.0), False)]
)
def test_an_axis_is_logarithmic_where_one_value_is_far_above_the_rest(values, is_log):
    assert Chart("", [Line("", series(*values))]).values.is_log == is_log


@pytest.mark.parametrize(
    "axis", [Axis(0, 60), Axis(0, 1), Axis(1.83, 3.52), Axis(1e-7, 2e-5), Axis(5, 5.001), Axis(-3, 9)]
)
def test_ticks_are_few_round_and_in_place(axis):
    assert 2 <= len(axis.ticks) <= 7
    for text, place in axis.ticks:
        value = float(text.replace(",", ""))
        assert 0 <= place <= 100
        assert 100 * (value - axis.low) / (axis.high - axis.low) == pytest.approx(place, abs=0.5)


@pytest.mark.parametrize("axis", [Axis(0.9, 1e6, True), Axis(1, 40, True), Axis(2, 3, True)])
def test_logarithmic_ticks_are_in_place(axis):
    assert axis.ticks and all(-1e-6 <= place <= 100 for _, place in axis.ticks)


@pytest.mark.parametrize(
    "values", [(2.0,), (0.0, 0.0), (1e99, 1.0), (math.nan, 4.0), (1e-99, 0.0), (2.0,) * 30 + (1e21,)]
)
def test_few_equal_and_huge_values_are_drawn(values):
    chart = Chart("", [Line("", series(*values), is_smoothed=True), Line("", series(*values))])
    assert chart.drawable and all(math.isfinite(y) for curve in chart.curves for part in curve.parts for _, y in part)


def test_nothing_finite_cannot_be_drawn():
    assert not Chart("", [Line("", series(math.nan))]).drawable and not Chart("", []).drawable


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2.71828, "2.718"),
        (1.5, "1.5"),
        (20.0, "20"),
        (1234.5, "1,234"),
        (2e-5, "2e-5"),
        (0.0123, "0.0123"),
        (-0.5, "-0.5"),
        (12_345_678.0, "1.23e7"),
        (math.inf, "inf"),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert number(value) == text
