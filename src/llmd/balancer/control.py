"""Flow control: an order, gates before it and rooms behind it."""

from __future__ import annotations

from collections.abc import Hashable

import attrs
import numpy as np

from ..amounts import kind
from ..booking import Booking
from ..types import Request, RequestId, WorkerId
from ..view import Mask, View
from .accounts import Accounts
from .gates import Gate
from .interface import Listener, Place
from .over import Over, room_among
from .rooms import Room
from .verdict import Verdict


@attrs.define(eq=False)
class FlowControl(Over):
    """An order with gates, rooms and accounts; each part stays its own.

    A request enters if the order and every gate let it in.  A worker has room
    if the order and every room say so.  The order's share, what hold-back
    leaves to a band, binds gates and rooms alike.

    Attributes:
        order: Orders what waits: `Bands`, `Vtc`, one of your own.
        gates: Asked on entry, all of them, so that a refusal names each cause.
        rooms: Asked before each dispatch.
        accounts: Figures of tenants; None keeps none.

    >>> from llmd.balancer import Bands, FixedRoom, RateLimit, Vtc
    >>> control = FlowControl(
    ...     Bands([Vtc(), Vtc()]),
    ...     gates=[RateLimit(requests_per_min=600.0)],
    ...     rooms=[FixedRoom(requests=8)],
    ... )
    """

    gates: tuple[Gate, ...] = attrs.field(
        default=(),
        converter=tuple,
        validator=attrs.validators.deep_iterable(kind(Gate)),
    )
    rooms: tuple[Room, ...] = attrs.field(
        default=(),
        converter=tuple,
        validator=attrs.validators.deep_iterable(kind(Room)),
    )
    accounts: Accounts | None = attrs.field(
        factory=Accounts,
        validator=attrs.validators.optional(kind(Accounts)),
        repr=False,
    )
    _listeners: tuple[Listener, ...] = attrs.field(init=False, repr=False)
    # Who presses, and the worker that is kept for it.
    _kept: tuple[RequestId, WorkerId] = attrs.field(default=("", ""), init=False)

    def __attrs_post_init__(self) -> None:
        accounts = () if self.accounts is None else (self.accounts,)
        self._listeners = (self.order, *self.gates, *self.rooms, *accounts)

    def place(self, request: Request, view: View, since: float) -> Place:
        place = self.order.place(request, view, since)
        lanes: tuple[Hashable, ...] = tuple([r.lane(request, view) for r in self.rooms])
        if not any(lanes):
            return place
        return Place(place.key, place.flow, (place.lane, lanes), place.until)

    def admit(self, request: Request, view: View) -> Verdict:
        verdict = self.order.admit(request, view)
        if not verdict.admitted:
            return verdict
        share = self.order.share(request, view)
        return Verdict.of([gate.check(request, share, view) for gate in self.gates])

    def room(self, request: Request, view: View) -> Mask:
        if not self.rooms:
            return self.order.room(request, view)
        share = self.order.share(request, view)
        open = self.rooms[0].open(request, share, view)
        for each in self.rooms[1:]:
            open = open & each.open(request, share, view)
        pressing = self.order.pressing
        if pressing is None:
            return room_among(self.order, request, view, open)
        return self._past(pressing, request, view, open)

    def _past(
        self, pressing: RequestId, request: Request, view: View, open: Mask
    ) -> Mask:
        """Say where *request* may go past one that presses, perhaps itself.

        Requests of other lanes could keep every worker too full for it for ever,
        so the worker that has least to compute takes nothing else meanwhile.
        """
        workers = view.workers
        if request.id != pressing:
            if self._kept[0] == pressing and self._kept[1] in workers.ids:
                open = open.copy()
                open[workers.ids.index(self._kept[1])] = False
            return room_among(self.order, request, view, open)
        room = room_among(self.order, request, view, open)
        kept = self._kept[0] == pressing and self._kept[1] in workers.ids
        if not room.any() and not kept and len(workers.ids):
            row = int(np.argmin(workers.prefill_tokens))
            self._kept = pressing, workers.ids[row]
        return room

    def admitted(self, request: Request, view: View) -> None:
        for listener in self._listeners:
            listener.admitted(request, view)

    def queued(self, request: Request, view: View) -> None:
        for listener in self._listeners:
            listener.queued(request, view)

    def unqueued(self, request: Request, view: View) -> None:
        for listener in self._listeners:
            listener.unqueued(request, view)

    def dispatched(self, booking: Booking, view: View) -> None:
        for listener in self._listeners:
            listener.dispatched(booking, view)

    def generated(self, booking: Booking, tokens: int, view: View) -> None:
        for listener in self._listeners:
            listener.generated(booking, tokens, view)

    def ended(self, booking: Booking, view: View) -> None:
        for listener in self._listeners:
            listener.ended(booking, view)
