"""A circuit breaker: stop asking a peer that keeps failing."""

from __future__ import annotations

import math

import attrs


@attrs.define
class CircuitBreaker:
    """Refuses for a while after repeated failures, then lets one try through.

    The pause doubles with each failed try, up to a limit.  M. Nygard, "Release
    It!", 2nd ed., chapter 5.

    Attributes:
        failures_to_open: Failures in a row that open the circuit.
        pause_s: First pause.
        longest_pause_s: No pause is longer.

    >>> breaker = CircuitBreaker(failures_to_open=1, pause_s=2.0)
    >>> breaker.failed(now=0.0)
    >>> breaker.allows(now=1.0), breaker.allows(now=2.5), breaker.allows(now=2.6)
    (False, True, False)
    """

    failures_to_open: int = 3
    pause_s: float = 1.0
    longest_pause_s: float = 60.0
    _failures: int = attrs.field(default=0, init=False)
    _closed_at: float = attrs.field(default=-math.inf, init=False)
    _pause_s: float = attrs.field(default=0.0, init=False)

    @property
    def open(self) -> bool:
        """The circuit has opened and no try has succeeded since."""
        return self._failures >= self.failures_to_open

    def allows(self, now: float) -> bool:
        """Say whether to try; true once after each pause while open."""
        if not self.open:
            return True
        if now < self._closed_at:
            return False
        # The try that is let through must report before the next may follow.
        self._closed_at = now + self._pause_s
        return True

    def succeeded(self) -> None:
        """Note a success: the circuit closes."""
        self._failures, self._pause_s = 0, 0.0

    def failed(self, now: float) -> None:
        """Note a failure."""
        self._failures += 1
        if self.open:
            self._pause_s = min(2 * self._pause_s or self.pause_s, self.longest_pause_s)
            self._closed_at = now + self._pause_s
