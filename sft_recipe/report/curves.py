"""Arithmetic on curves: smoothing, noise, and where a smoothed curve turns."""

import math
import statistics
from collections.abc import Sequence

SMOOTHING_PART = 8  # a window is an eighth of the curve: short enough to show a rise, long enough to average batches
SMALLEST_WINDOW = 3
SIGNIFICANT = 3.0  # standard errors: a change that noise explains once in several hundred runs


def window(count: int) -> int:
    """Return the number of values that smoothing averages in a curve of `count` values."""
    return max(SMALLEST_WINDOW, count // SMOOTHING_PART)


def smooth(values: Sequence[float]) -> list[float]:
    """Return the running mean, centered, over `window` values; at the ends over those that there are.

    Every value must be finite.
    """
    half = window(len(values)) // 2
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    bounds = [(max(0, at - half), min(len(values), at + half + 1)) for at in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in bounds]


def ends_size(count: int) -> int:
    """Return of how many values `ends` takes the means in a curve of `count` values."""
    return max(1, min(window(count), count // 2))


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Return the means of the first and of the last `window` values: the level at the start and at the end.

    Those of a short curve are its halves.
    """
    size = ends_size(len(values))
    return statistics.fmean(values[:size]), statistics.fmean(values[-size:])


def noise(values: Sequence[float]) -> float:
    """Return the standard deviation of a value around its curve; infinity where there are fewer than two.

    It comes from the differences between neighbors, so that a trend does not count as noise.
    """
    squares = [(after - before) ** 2 for before, after in zip(values, values[1:], strict=False)]
    return math.sqrt(statistics.fmean(squares) / 2) if squares else math.inf


def uncertainty(values: Sequence[float]) -> float:
    """Return the standard error of the difference between two means over `window` values."""
    return noise(values) * math.sqrt(2 / min(window(len(values)), max(1, len(values))))


def swings(values: Sequence[float], smallest: float) -> int:
    """Return how often a curve rises by at least `smallest` from a low point and falls as far again."""
    count, low, high, is_rising = 0, math.inf, -math.inf, False
    for value in values:
        if is_rising:
            high = max(high, value)
            if high - value >= smallest:
                count, low, is_rising = count + 1, value, False
        else:
            low = min(low, value)
            if value - low >= smallest:
                high, is_rising = value, True
    return count
