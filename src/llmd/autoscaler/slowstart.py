"""Traffic that grows with the age of a worker, around any balancer."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np

from ..balancer import QueueBalancer, Verdict
from ..errors import InvalidPolicy
from ..types import Request, State, WorkerId
from ..view import Mask, View


@attrs.define(kw_only=True)
class SlowStart(QueueBalancer):
    """Lets a worker that has just become ready take a few requests at first.

    Its caches are empty, so the first requests are its slowest; a burst that
    waited for it would all land on it at once.

    Attributes:
        balancer: Whose order and room it is otherwise.
        ramp: Seconds until a worker takes what it can.
        first: Requests at once, at first.

    >>> from llmd import Fcfs
    >>> SlowStart(balancer=Fcfs(), ramp=10.0).first
    1
    """

    balancer: QueueBalancer
    ramp: float = 30.0
    first: int = 1
    _states: tuple[State, ...] | None = attrs.field(default=None, init=False)
    _since: dict[WorkerId, float] = attrs.field(factory=dict, init=False)
    _newest: float = attrs.field(default=0.0, init=False)

    def __attrs_post_init__(self) -> None:
        if self.ramp <= 0 or self.first < 1:
            raise InvalidPolicy("ramp must be positive and first at least 1")

    def key(self, request: Request, view: View) -> Any:
        return self.balancer.key(request, view)

    def admit(self, request: Request, view: View) -> Verdict:
        return self.balancer.admit(request, view)

    def dispatched(self, request: Request, uncached_tokens: int, view: View) -> None:
        self.balancer.dispatched(request, uncached_tokens, view)

    def generated(self, request: Request, tokens: int, view: View) -> None:
        self.balancer.generated(request, tokens, view)

    def room(self, request: Request, view: View) -> Mask:
        room, workers = self.balancer.room(request, view), view.workers
        if workers.states is not self._states:
            self._look(view)
        young = self._young(view)
        if not young:
            return room
        room = room.copy()
        for row, age in young:
            most = int(workers.max_running[row])
            allowed = self.first + (most - self.first) * age / self.ramp
            room[row] &= bool(workers.running_requests[row] < allowed)
        return room

    def _young(self, view: View) -> list[tuple[int, float]]:
        """Return the rows of young workers, and how old each is, seconds."""
        if view.now - self._newest >= self.ramp:
            return []
        ids = np.array(view.workers.ids)
        return [
            (int(np.searchsorted(ids, worker)), view.now - since)
            for worker, since in self._since.items()
            if view.now - since < self.ramp
        ]

    def _look(self, view: View) -> None:
        ready = zip(view.workers.ids, view.workers.states, strict=True)
        self._since = {
            worker: self._since.get(worker, view.now)
            for worker, state in ready
            if state is State.READY
        }
        self._newest = max(self._since.values(), default=0.0)
        self._states = view.workers.states
