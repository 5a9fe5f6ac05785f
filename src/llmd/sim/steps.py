"""Runs of steps that differ in nothing but the length of contexts."""

from __future__ import annotations

import attrs


@attrs.define
class Run:
    """Steps that follow each other with nothing else changing.

    Contexts grow by the same in each, and step times are linear in context,
    so the sum is exact.

    Attributes:
        start: When the first begins.
        steps: How many.
        first_s: Seconds of the first.
        growth_s: Seconds by which each is longer than the one before.

    >>> run = Run(start=10.0, steps=4, first_s=1.0, growth_s=0.5)
    >>> run.end, run.steps_by(12.0), run.steps_by(10.0)
    (17.0, 2, 1)
    """

    start: float
    steps: int
    first_s: float
    growth_s: float = 0.0

    @property
    def end(self) -> float:
        """When the last step ends."""
        return self.after(self.steps)

    def after(self, steps: int) -> float:
        """Return when the first *steps* have ended."""
        grown = self.growth_s * (steps - 1) / 2.0
        return self.start + steps * (self.first_s + grown)

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
