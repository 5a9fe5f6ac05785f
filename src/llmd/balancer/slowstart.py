"""Traffic that grows with the age of a worker."""

from __future__ import annotations

import math

import attrs
import numpy as np

from ..types import Request, WorkerId
from ..view import Mask, View
from .amounts import COUNT, POSITIVE
from .rooms import Room

_REMEMBERED = 4096
_A_MOMENT_S = 1e-6
"""After a place has grown, so that floats agree that it has."""


@attrs.define(kw_only=True)
class SlowStart(Room):
    """Lets a worker that has just become ready take a few requests at first.

    Its caches are empty, so the first requests are its slowest; a burst that
    waited for it would all land on it at once.  Age counts from when it is
    first seen ready.

    Attributes:
        ramp: Seconds until a worker takes what it can.
        first: Requests at once, at first.

    >>> SlowStart(ramp=10.0).first
    1
    """

    ramp: float = attrs.field(default=30.0, validator=POSITIVE)
    first: int = attrs.field(default=1, validator=COUNT)
    _since: dict[WorkerId, float] = attrs.field(factory=dict, init=False)

    def open(self, request: Request, share: float, view: View) -> Mask:
        workers, since = view.workers, self._since
        seen = [since.setdefault(worker, view.now) for worker in workers.ids]
        if len(since) > _REMEMBERED + len(seen):
            self._since = dict(zip(workers.ids, seen, strict=True))
        grown = np.minimum((view.now - np.array(seen)) / self.ramp, 1.0)
        most = self.first + (workers.max_running - self.first) * grown
        allowed: Mask = workers.running_requests < most
        return allowed

    def opens_at(self, view: View, after: float) -> float:
        workers, times = view.workers, []
        for worker, most in zip(workers.ids, workers.max_running.tolist(), strict=True):
            since, grows = self._since.get(worker), most - self.first
            if since is None or grows <= 0 or after >= since + self.ramp:
                continue
            # It takes one more each time that it has grown by a whole one.
            each_s = self.ramp / grows
            grown = max(math.floor((after - since) / each_s), 0)
            next_at = since + grown * each_s + _A_MOMENT_S
            times.append(next_at if next_at > after else next_at + each_s)
        return min(times, default=math.inf)
