"""What times of tokens tell of the steps between them."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np


@attrs.frozen
class First:
    """When a prompt was asked, computed and answered.

    All by one clock: an engine's own is this one, on Linux.
    """

    asked: float
    scheduled: float
    stamp: float
    came: float

    @property
    def computed_s(self) -> float:
        return self.stamp - self.scheduled

    @property
    def waited_s(self) -> float:
        return self.came - self.asked

    @property
    def late_s(self) -> float:
        return self.came - self.stamp


def longer(times: Sequence[float], asked: float, came: float, steps: int) -> float:
    """Return what each of *steps* took that were not like the others.

    They are among those between *asked* and *came*.
    """
    first = int(np.searchsorted(times, asked)) - 1
    last = min(int(np.searchsorted(times, came)) + 2, len(times) - 1)
    before = max(first - 20, 4)
    usual = (times[first] - times[before]) / (first - before)
    return (times[last] - times[first] - usual * (last - first - steps)) / steps


def launch(times: Sequence[float], asked: float, came: float) -> tuple[float, float]:
    """Return the longest gap of tokens between *asked* and *came*, and the next."""
    first = int(np.searchsorted(times, asked)) - 1
    last = int(np.searchsorted(times, came)) + 2
    gaps = np.diff(times[first : last + 1])
    longest = int(gaps[:-1].argmax())
    return float(gaps[longest]), float(gaps[longest + 1])
