"""What times of tokens tell of the steps between them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

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


@attrs.frozen
class Launch:
    """What the host took to launch a step with a prompt, and the step behind it.

    Attributes:
        requests: Those that the prompt joined.
        tokens: Of the prompt, without what was cached.
        cached: Tokens of it that were.
        prompt_s: For the step with the prompt.
        next_s: For the next.
    """

    requests: int
    tokens: int
    cached: int
    prompt_s: float
    next_s: float


def usual(launches: Iterable[Launch]) -> list[Launch]:
    """Return the median of those that are alike: a host is slow for seconds.

    >>> usual([Launch(4, 64, 0, s, s / 4) for s in (0.012, 0.020, 0.012)])
    [Launch(requests=4, tokens=64, cached=0, prompt_s=0.012, next_s=0.003)]
    """
    alike: dict[tuple[int, int, int], list[Launch]] = defaultdict(list)
    for one in launches:
        alike[one.requests, one.tokens, one.cached].append(one)
    return [
        Launch(
            *sizes,
            statistics.median(one.prompt_s for one in found),
            statistics.median(one.next_s for one in found),
        )
        for sizes, found in alike.items()
    ]


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
