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

from ..view import Floats, Ints

_RESAMPLES = 400
_STRETCHES = 50


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


def interval(figure: Callable[..., float], columns: Sequence[Floats]) -> Interval:
    """Return figure(*columns) and its 95 % interval.

    Args:
        figure: Of columns, each shape (n,).
        columns: Resampled together, row by row, so that what they share
            cancels in a difference.
    """
    rng = np.random.default_rng(0)
    size = len(columns[0])
    drawn = []
    for _ in range(_RESAMPLES):
        rows = _stretches(size, rng)
        drawn.append(figure(*[column[rows] for column in columns]))
    known = [value for value in drawn if value == value]
    low, high = np.percentile(known, [2.5, 97.5]) if known else (math.nan, math.nan)
    return Interval(figure(*columns), float(low), float(high))


def percentile_of(percentile: float) -> Callable[[Floats], float]:
    """Return a function that gives a percentile of what is not NaN."""

    def figure(column: Floats) -> float:
        known = column[~np.isnan(column)]
        return float(np.percentile(known, percentile)) if len(known) else math.nan

    return figure


def mean(column: Floats) -> float:
    """Return the mean of what is not NaN."""
    known = column[~np.isnan(column)]
    return float(known.mean()) if len(known) else math.nan


def _stretches(size: int, rng: np.random.Generator) -> Ints:
    """Draw rows in stretches of a fiftieth, as many as there are."""
    length = max(size // _STRETCHES, 1)
    starts = rng.integers(max(size - length, 0) + 1, size=-(-size // length))
    rows: Ints = (starts[:, None] + np.arange(length)).ravel()[:size]
    return rows
