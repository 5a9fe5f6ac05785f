"""Time slices to compare with: a lock, and fair shares by the clock."""

from __future__ import annotations

import math

import attrs

from .amounts import SHORTEST_TURN_S, amount
from .interface import GpuView, TimeSlice, Turn


@attrs.define
class FifoLock(TimeSlice):
    """Gives the GPU to whoever asked first, until it lets go.

    This is how llm-d time-slices training jobs: a lock, first in first out.  A
    job releases its lock itself; an engine has let go when it had no request
    for a while.

    Attributes:
        linger_s: How long an idle engine still holds the lock.

    >>> FifoLock().linger_s
    0.0
    """

    linger_s: float = attrs.field(default=0.0, validator=amount(endless=True))
    _busy_at: float = attrs.field(default=-math.inf, init=False)

    def next(self, view: GpuView) -> Turn:
        holder = view.running
        rivals = [slot for slot in view.wanting if slot.engine != holder]
        if holder is not None:
            if view.slot(holder).requests > 0 or not rivals:
                self._busy_at = view.now
                return Turn(holder)
            left_s = self._busy_at + self.linger_s - view.now
            if left_s > 0:
                return Turn(holder, left_s)
        if not rivals:
            return Turn(holder)
        return Turn(min(rivals, key=lambda slot: (slot.since, slot.engine)).engine)


@attrs.define
class FairShare(TimeSlice):
    """Gives the GPU to whoever had least of it for its weight.

    Virtual time, as in start-time fair queueing and Linux's CFS: an engine's
    clock runs while it has the GPU, slower the more weight it has, and is set
    forward to the others' when it comes back from idling.  Knows no urgency,
    and charges no switch to anybody.

    Attributes:
        quantum_s: The shortest turn, while others wait.

    >>> FairShare(quantum_s=0.5).quantum_s
    0.5
    """

    quantum_s: float = attrs.field(default=1.0, validator=amount(SHORTEST_TURN_S))
    _clocks: dict[str, float] = attrs.field(factory=dict, init=False)
    _wanting: frozenset[str] = attrs.field(default=frozenset(), init=False)

    def next(self, view: GpuView) -> Turn:
        self._set_forward(view)
        running = view.running
        rivals = [slot for slot in view.wanting if slot.engine != running]
        if not rivals:
            return Turn(running or next((s.engine for s in view.wanting), None))
        least = min(rivals, key=lambda slot: (self._clocks[slot.engine], slot.engine))
        if running is not None and view.slot(running).requests > 0:
            if view.turn_s < self.quantum_s:
                return Turn(running, self.quantum_s - view.turn_s)
            own = view.slot(running)
            behind = self._clocks[least.engine] - (
                self._clocks[running] + view.turn_s / own.weight
            )
            if behind > 0:
                return Turn(running, behind * own.weight)
        elif running is None:
            mine = min(
                view.wanting, key=lambda slot: (self._clocks[slot.engine], slot.engine)
            )
            return Turn(mine.engine, self.quantum_s)
        return Turn(least.engine, self.quantum_s)

    def ran(self, engine: str, run_s: float, switch_s: float, view: GpuView) -> None:
        weight = view.slot(engine).weight
        self._clocks[engine] = self._clocks.get(engine, 0.0) + run_s / weight

    def left(self, engine: str) -> None:
        self._clocks.pop(engine, None)
        self._wanting -= {engine}

    def _set_forward(self, view: GpuView) -> None:
        wanting = frozenset(slot.engine for slot in view.wanting)
        busy = [self._clocks[name] for name in wanting & self._wanting]
        floor = min(busy, default=max(self._clocks.values(), default=0.0))
        for name in wanting - self._wanting:
            self._clocks[name] = max(self._clocks.get(name, 0.0), floor)
        self._wanting = wanting
