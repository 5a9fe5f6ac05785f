"""A balancer that lies over another and changes some of what it says."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from typing import Any

import attrs

from ..amounts import kind
from ..booking import Booking
from ..types import Request, RequestId
from ..view import Mask, View
from .interface import Place, QueueBalancer
from .orders import Fcfs
from .verdict import Verdict


def room_among(order: QueueBalancer, request: Request, view: View, open: Mask) -> Mask:
    """Ask *order* for room among the workers that are *open*, (W,), alone.

    One that holds a request for its best worker must not hold it for a worker
    that somebody else has closed.
    """
    if open.all():
        return order.room(request, view)
    room = open.copy()
    if room.any():
        room[open] = order.room(request, view.only(open))
    return room


def says(order: QueueBalancer, name: str) -> bool:
    """Say whether an order, or what it lies over, has its own method or property.

    >>> says(Over(Fcfs()), "restless"), says(Over(Fcfs()), "admit")
    (False, True)
    """
    while getattr(type(order), name) is getattr(Over, name):
        order = order.order  # type: ignore[attr-defined]
    return getattr(type(order), name) is not getattr(QueueBalancer, name)


@attrs.define(eq=False)
class Over(QueueBalancer):
    """Does as `order` does; subclasses change what they are there for.

    Attributes:
        order: The balancer below.

    >>> Over(Fcfs(max_waiting=9)).order
    Fcfs(max_running=None, max_waiting=9)
    """

    order: QueueBalancer = attrs.field(factory=Fcfs, validator=kind(QueueBalancer))

    def key(self, request: Request, view: View) -> Any:
        return self.order.key(request, view)

    def flow(self, request: Request) -> Hashable:
        return self.order.flow(request)

    def turn(self, flow: Hashable, view: View) -> Any:
        return self.order.turn(flow, view)

    def place(self, request: Request, view: View, since: float) -> Place:
        return self.order.place(request, view, since)

    @property
    def restless(self) -> Collection[Hashable]:
        """Flows whose turn may change by what happens to others."""
        return self.order.restless

    def moved(self, view: View) -> Iterable[RequestId]:
        return self.order.moved(view)

    def tokens_before(self, request: Request, view: View) -> int:
        return self.order.tokens_before(request, view)

    def tokens_ahead(self, request: Request, view: View) -> int:
        return self.order.tokens_ahead(request, view)

    @property
    def pressing(self) -> Collection[RequestId]:
        """Requests that must not be overtaken any more."""
        return self.order.pressing

    def opens_at(self, view: View, after: float) -> float:
        return self.order.opens_at(view, after)

    def admit(self, request: Request, view: View) -> Verdict:
        return self.order.admit(request, view)

    def share(self, request: Request, view: View) -> float:
        return self.order.share(request, view)

    def room(self, request: Request, view: View) -> Mask:
        return self.order.room(request, view)

    def preempts(self, request: Request, view: View) -> bool:
        own = type(self).yields is not Over.yields
        return own or self.order.preempts(request, view)

    def yields(self, booking: Booking, request: Request, view: View) -> bool:
        return self.order.yields(booking, request, view)

    def admitted(self, request: Request, view: View) -> None:
        self.order.admitted(request, view)

    def queued(self, request: Request, view: View) -> None:
        self.order.queued(request, view)

    def unqueued(self, request: Request, view: View) -> None:
        self.order.unqueued(request, view)

    def dispatched(self, booking: Booking, view: View) -> None:
        self.order.dispatched(booking, view)

    def generated(self, booking: Booking, tokens: int, view: View) -> None:
        self.order.generated(booking, tokens, view)

    def ended(self, booking: Booking, view: View) -> None:
        self.order.ended(booking, view)
