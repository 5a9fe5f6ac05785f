"""What goes wrong in a simulated fleet."""

from __future__ import annotations

import math
from collections.abc import Iterable

import attrs

from ..errors import InvalidRequest
from ..types import Worker, WorkerId

_RESTARTED = "-at-"
_SHOWN = 5


@attrs.frozen(kw_only=True)
class Crash:
    """A worker dies.

    Attributes:
        at: When.
        worker: Which, or who has taken its place since; nothing happens if that
            is gone.
        restart_after_s: Seconds until another joins in its place; inf: never.
    """

    at: float
    worker: WorkerId
    restart_after_s: float = math.inf

    def __attrs_post_init__(self) -> None:
        if not (0.0 <= self.at < math.inf and self.restart_after_s >= 0.0):
            raise InvalidRequest(f"{self!r} has no time")

    def of(self, workers: Iterable[WorkerId]) -> None:
        """Check that it is a crash of one of *workers*, or of a successor.

        Raises:
            InvalidRequest: It is of nobody.
        """
        there = sorted(workers)
        if self.worker.partition(_RESTARTED)[0] not in there:
            raise InvalidRequest(f"{self!r}: workers are {there[:_SHOWN]}")


@attrs.define(eq=False)
class Places:
    """Who has taken the place of whom.

    >>> places = Places()
    >>> places.taken(Worker(id="a"), at=2.0).id, places.holder("a")
    ('a-at-2', 'a-at-2')
    """

    _next: dict[WorkerId, WorkerId] = attrs.field(factory=dict, init=False)

    def holder(self, worker: WorkerId) -> WorkerId:
        """Return who has the place of *worker* now, itself if nobody took it."""
        while worker in self._next:
            worker = self._next[worker]
        return worker

    def taken(self, worker: Worker, at: float) -> Worker:
        """Return who takes the place of one that died *at* a time."""
        name = worker.id.partition(_RESTARTED)[0]
        self._next[worker.id] = f"{name}{_RESTARTED}{at:g}"
        return attrs.evolve(worker, id=self._next[worker.id])
