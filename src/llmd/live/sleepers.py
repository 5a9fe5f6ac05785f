"""Requests that wait in a cluster for an engine that sleeps, as its demand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import attrs

from .. import commands as c
from .. import events as e
from ..cluster import Cluster
from ..types import Request, RequestId, WorkerId


class Wishful(Protocol):
    """An engine that a request may wait for."""

    @property
    def worker(self) -> WorkerId:
        """Its id in the cluster; empty before it has started."""

    def could_serve(self, request: Request) -> bool:
        """Say whether it sleeps, and could serve *request* if it did not."""

    def wish(self, request: Request) -> None:
        """Count *request* as a wish for the GPU."""

    def unwish(self, id: RequestId) -> None:
        """Count it no more."""


@attrs.define(eq=False)
class Sleepers:
    """Watches a cluster, and has whoever sleeps wish for what waits for it.

    A worker that sleeps gets no requests: they wait in the balancer's order and
    go to whoever wakes first.  Bounded by what waits in the cluster.

    Attributes:
        cluster: Observed; its own observer is asked as before.
        engines: Returns those to look at.
    """

    cluster: Cluster
    engines: Callable[[], Iterable[Wishful]]
    _wished: dict[RequestId, list[Wishful]] = attrs.field(factory=dict, init=False)
    _before: Callable[[Any], object] | None = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._before = self.cluster.observer
        self.cluster.observer = self.observe

    def observe(self, entry: e.Event | c.Command) -> None:
        """Take note of an event or command."""
        if self._before is not None:
            self._before(entry)
        match entry:
            case e.RequestArrived(request=request) | c.Requeue(request=request):
                if self.cluster.waits(request.id):
                    self._wait(request)
            case c.Dispatch(request=request, decision=decision):
                self._over(request.id, decision.decode)
            case c.Fail(request=request):
                self._over(request.id)
            case e.RequestCancelled(request_id=id):
                self._over(id)
            case _:
                pass

    def _wait(self, request: Request) -> None:
        wished = [one for one in self.engines() if one.could_serve(request)]
        if wished:
            self._wished[request.id] = wished
        for one in wished:
            one.wish(request)

    def _over(self, id: RequestId, worker: WorkerId = "") -> None:
        """End the wishes but that of *worker*, which goes on with its answer."""
        for one in self._wished.pop(id, ()):
            if one.worker != worker:
                one.unwish(id)
