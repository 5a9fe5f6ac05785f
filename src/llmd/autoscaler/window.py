"""What was seen in the last so many seconds: extremes, rates and means."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import attrs

from ..errors import NoSignal
from ..view import View


def moment(view: View) -> float:
    """Return the time of *view*, seconds, for what measures over time.

    Raises:
        NoSignal: Nothing has happened yet, so there is none.
    """
    if not math.isfinite(view.now):
        raise NoSignal("nothing has happened yet")
    return view.now


@attrs.define
class Window:
    """The least or greatest of what was wished within a window.

    It keeps only what can still become the extreme, so pushing is O(1)
    amortised and it holds no more than the wishes of one window.

    Attributes:
        best: `min` or `max`.

    >>> window = Window(max)
    >>> [window.push(float(at), wish, 2.5) for at, wish in enumerate([5, 3, 4, 1])]
    [5, 5, 5, 4]
    """

    best: Callable[[int, int], int]
    _kept: deque[tuple[float, int]] = attrs.field(factory=deque, init=False)

    def push(self, at: float, wish: int, window: float, seed: int | None = None) -> int:
        """Note *wish* and return the extreme of the last *window* seconds.

        Args:
            at: Now.
            wish: What is wished.
            window: Seconds; what is as old as that is too old.
            seed: What counts as wished before, on the first call.
        """
        kept = self._kept
        if seed is not None and not kept:
            kept.append((at, seed))
        while kept and self.best(kept[-1][1], wish) == wish:
            kept.pop()
        kept.append((at, wish))
        while kept[0][0] <= at - window and len(kept) > 1:
            kept.popleft()
        return kept[0][1]


@attrs.define
class Meter:
    """How fast a running total grew in the last so many seconds.

    Attributes:
        window: Seconds to look back, at least while it is that old.
        step: Seconds between two looks that are kept.

    >>> meter = Meter(window=10.0)
    >>> meter.rate(0.0, 100.0)
    nan
    >>> meter.rate(5.0, 150.0)
    10.0
    """

    window: float
    step: float = 1.0
    _seen: deque[tuple[float, float]] = attrs.field(factory=deque, init=False)

    def rate(self, at: float, total: float) -> float:
        """Return the growth a second; NaN until it has been watched."""
        seen = self._seen
        if not seen or at - seen[-1][0] >= self.step:
            seen.append((at, total))
        while len(seen) > 1 and seen[1][0] <= at - self.window:
            seen.popleft()
        then, before = seen[0]
        return (total - before) / (at - then) if at > then else math.nan


@attrs.define
class Mean:
    """The mean over time of what was seen in the last so many seconds.

    Attributes:
        step: Seconds that one bucket spans.
        longest: Seconds to keep.

    >>> mean = Mean(longest=60.0)
    >>> for at in range(4):
    ...     mean.add(float(at), float(at))
    >>> mean.over(4.0, 60.0), mean.over(3.0, 1.5)
    (1.5, 2.5)
    """

    longest: float
    step: float = 1.0
    _buckets: deque[tuple[int, float, int]] = attrs.field(factory=deque, init=False)

    def add(self, at: float, value: float) -> None:
        """See *value* at *at*."""
        bucket, buckets = math.floor(at / self.step), self._buckets
        if buckets and buckets[-1][0] == bucket:
            _, total, count = buckets.pop()
            buckets.append((bucket, total + value, count + 1))
        else:
            buckets.append((bucket, value, 1))
        while buckets[0][0] < (at - self.longest) / self.step:
            buckets.popleft()

    def over(self, at: float, window: float) -> float:
        """Return the mean of the last *window* seconds, NaN if nothing was seen."""
        since = (at - window) / self.step
        means = [total / count for row, total, count in self._buckets if row >= since]
        return sum(means) / len(means) if means else math.nan
