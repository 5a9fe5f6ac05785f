"""How fast requests leave, for those who ask when to come back."""

from __future__ import annotations

import math
from collections import deque

import attrs


@attrs.define(eq=False)
class Pace:
    """The mean time between the last dispatches, at most 33 of them.

    >>> pace = Pace()
    >>> for at in (0.0, 1.0, 4.0):
    ...     pace.count(at)
    >>> pace.each_s
    2.0
    """

    _at: deque[float] = attrs.field(factory=lambda: deque(maxlen=33), init=False)

    def count(self, at: float) -> None:
        """Note a dispatch at *at*, seconds."""
        self._at.append(at)

    @property
    def each_s(self) -> float:
        """Seconds from one to the next; NaN while too few were seen."""
        times = self._at
        if len(times) < 2 or times[-1] == times[0]:
            return math.nan
        return (times[-1] - times[0]) / (len(times) - 1)
