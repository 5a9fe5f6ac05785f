"""Intervals by resampling stretches of arrivals.

Requests that arrive near each other share their luck, so single requests are
no independent draws: whole stretches are drawn (block bootstrap; Kuensch, "The
jackknife and the bootstrap for general stationary observations", Annals of
Statistics 17(3), 1989).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import attrs
import numpy as np

from ..amounts import as_real
from ..errors import InvalidRequest, shown
from ..view import Floats, Ints

_RESAMPLES = 400
_STRETCHES = 50
_FEWEST_STRETCHES = 8
_Z = 1.96


@attrs.frozen
class Interval:
    """A figure and where it lies with 95 % confidence.

    >>> str(Interval(1.0, 0.9, 1.25))
    '1 [0.9, 1.25]'
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def interval(
    figure: Callable[..., float],
    columns: Sequence[Floats],
    *,
    stretch: float = 0.0,
    copies: int = 1,
) -> Interval:
    """Return figure(*columns) and its 95 % interval.

    One run of a few hundred requests near saturation sees hardly more than one
    busy period, and no resampling makes more of it: there such intervals are still
    too narrow.  Take several seeds.

    Few stretches make percentiles of what is drawn too narrow, so these are
    widened as Student's distribution is beside the normal one.

    Args:
        figure: Of columns, each shape (n,).
        columns: Resampled together, row by row, so that what they share
            cancels in a difference.
        stretch: Rows whose luck hangs together; a fiftieth of them at least, and
            an eighth at most.
        copies: Columns are so many runs of the same rows, one after the other,
            which are drawn together: more runs of them are no more rows.
    """
    rng = np.random.default_rng(0)
    size = len(columns[0]) // copies
    most = max(size // _FEWEST_STRETCHES, 1)
    length = max(min(math.ceil(stretch), most), size // _STRETCHES, 1)
    runs = np.arange(copies)[:, None] * size
    drawn = []
    for _ in range(_RESAMPLES):
        rows = (runs + _stretches(size, length, rng)).ravel()
        drawn.append(figure(*[column[rows] for column in columns]))
    value = figure(*columns)
    known = [other for other in drawn if other == other]
    low, high = np.percentile(known, [2.5, 97.5]) if known else (math.nan, math.nan)
    wider = _student(-(-size // length))
    if wider == math.inf:  # one request says nothing of others
        return Interval(value, -wider, wider)
    low, high = value + (low - value) * wider, value + (high - value) * wider
    return Interval(value, float(low), float(high))


def percentile_of(percentile: float) -> Callable[[Floats], float]:
    """Return a function that gives a percentile of what is not NaN."""
    if not 0.0 <= as_real(percentile) <= 100.0:
        raise InvalidRequest(f"there is no percentile {shown(percentile)}")

    def figure(column: Floats) -> float:
        known = column[~np.isnan(column)]
        return float(np.percentile(known, percentile)) if len(known) else math.nan

    return figure


def mean(column: Floats) -> float:
    """Return the mean of what is not NaN."""
    known = column[~np.isnan(column)]
    return float(known.mean()) if len(known) else math.nan


def _student(stretches: int) -> float:
    """Return by how much so few draws widen an interval.

    Cornish and Fisher's expansion of Student's quantile (Abramowitz and Stegun
    26.7.5), and the bias of a variance over few.
    """
    if stretches < 2:
        return math.inf
    free, z = stretches - 1, _Z
    first = (z**3 + z) / (4 * free)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return (z + first + second) / z * math.sqrt(stretches / free)


def _stretches(size: int, length: int, rng: np.random.Generator) -> Ints:
    """Draw rows in stretches of *length*, as many as there are."""
    starts = rng.integers(max(size - length, 0) + 1, size=-(-size // length))
    rows: Ints = (starts[:, None] + np.arange(length)).ravel()[:size]
    return rows
