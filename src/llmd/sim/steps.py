"""Runs of steps that differ in nothing but the length of contexts."""

from __future__ import annotations

import math

import attrs


@attrs.define
class Run:
    """Steps that follow each other with nothing else changing.

    Contexts grow by the same in each, and step times are linear in context,
    so the sum is exact, and so is that of what each takes at least.

    Attributes:
        start: When the first begins.
        steps: How many.
        first_s: Seconds of the first.
        growth_s: Seconds by which each is longer than the one before.
        lag_s: By how much the first ends sooner, since the GPU was at it already.
        least_s: Seconds that each takes at least, since the host launches the next.

    >>> Run(start=0.0, steps=4, first_s=1.0, growth_s=1.0, least_s=2.5).end
    12.0
    >>> run = Run(start=10.0, steps=4, first_s=1.0, growth_s=0.5)
    >>> run.end, run.steps_by(12.0), run.steps_by(10.0)
    (17.0, 2, 1)
    """

    start: float
    steps: int
    first_s: float
    growth_s: float = 0.0
    lag_s: float = 0.0
    least_s: float = 0.0

    @property
    def end(self) -> float:
        """When the last step ends."""
        return self.after(self.steps)

    def after(self, steps: int) -> float:
        """Return when the first *steps* have ended."""
        short = self._short(steps) if self.first_s < self.least_s else 0
        long, grown = steps - short, self.growth_s * (short + steps - 1) / 2.0
        return (
            self.start
            + short * self.least_s
            + long * (self.first_s + grown)
            - (self.lag_s if steps else 0.0)
        )

    def _short(self, steps: int) -> int:
        """Count those of the first *steps* that take the GPU less than the least."""
        if self.growth_s <= 0.0:
            return steps
        return min(steps, math.ceil((self.least_s - self.first_s) / self.growth_s))

    def end_of_step(self, now: float) -> float:
        """Return when the step under way at *now* ends."""
        return self.after(self.steps_by(now))

    def steps_by(self, now: float) -> int:
        """Count the steps begun by *now*, at least 1, in O(log steps)."""
        low, high = 1, self.steps
        while low < high:
            middle = (low + high) >> 1
            if self.after(middle) > now:
                high = middle
            else:
                low = middle + 1
        return low
