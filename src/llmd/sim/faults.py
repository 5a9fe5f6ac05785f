"""What goes wrong in a simulated fleet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection

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

    def check(self, workers: Collection[WorkerId]) -> None:
        """Check that it is a crash of one of *workers*, or of a successor.

        Raises:
            InvalidRequest: It is of nobody.
        """
        if self.worker in workers or self.worker.rpartition(_RESTARTED)[0] in workers:
            return
        some = ", ".join(sorted(workers)[:_SHOWN])
        more = f" and {len(workers) - _SHOWN} more" * (len(workers) > _SHOWN)
        raise InvalidRequest(f"{self!r}: workers are {some}{more}")


@attrs.define(eq=False)
class Places:
    """Who has taken the place of whom.

    >>> places = Places()
    >>> places.taken(Worker(id="a"), at=2.0, by_others=()).id, places.holder("a")
    ('a-at-2', 'a-at-2')
    """

    _next: dict[WorkerId, WorkerId] = attrs.field(factory=dict, init=False)
    _first: dict[WorkerId, WorkerId] = attrs.field(factory=dict, init=False)
    """Who had the place of a successor at the beginning."""

    def holder(self, worker: WorkerId) -> WorkerId:
        """Return who has the place of *worker* now, itself if nobody took it."""
        while worker in self._next:
            worker = self._next[worker]
        return worker

    def taken(
        self, worker: Worker, at: float, by_others: Collection[WorkerId]
    ) -> Worker:
        """Return who takes the place of one that died *at* a time.

        Its id is none of *by_others*, and no other successor's.
        """
        first = self._first.get(worker.id, worker.id)
        id = name = f"{first}{_RESTARTED}{at:g}"
        again = itertools.count(2)
        while id in self._first or id in by_others:
            id = f"{name}-{next(again)}"
        self._first[id], self._next[worker.id] = first, id
        return attrs.evolve(worker, id=id)
