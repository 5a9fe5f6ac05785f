"""Looks at a cluster when time alone may let somebody go, as the simulator does."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import attrs

_LEAST_S = 1e-3
"""Between two rings, whatever a policy says: others have work to do as well."""


@attrs.define(eq=False)
class Alarm:
    """Calls *ring* at the earliest of the times it was set to.

    Attributes:
        ring: Called with that time, on the event loop.

    >>> rung = []
    >>> async def set_and_wait():
    ...     alarm = Alarm(rung.append)
    ...     alarm.set(7.0, now=6.99)
    ...     alarm.set(8.0, now=6.99)  # later: it rings before, and is set anew
    ...     await asyncio.sleep(0.05)
    >>> asyncio.run(set_and_wait())
    >>> rung
    [7.0]
    """

    ring: Callable[[float], None]
    _at: float = attrs.field(default=math.inf, init=False)
    _rang_at: float = attrs.field(default=-math.inf, init=False)
    _timer: asyncio.TimerHandle | None = attrs.field(default=None, init=False)

    def set(self, at: float, now: float) -> None:
        """Ring *at* a time, unless it rings sooner or has rung for it before."""
        if self._rang_at < at < self._at:
            self.stop()
            self._at = at
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(at - now, _LEAST_S), self._due)

    def stop(self) -> None:
        """Do not ring, until it is set again."""
        self._at = math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        self._rang_at = at = self._at
        self.stop()
        self.ring(at)
