"""Flow control: an order, gates before it and rooms behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Hashable, Iterable
from typing import Any

import attrs
import numpy as np

from ..amounts import kind
from ..booking import Booking
from ..errors import PolicyError, shown
from ..types import Request, RequestId, WorkerId
from ..view import Mask, View
from .accounts import Accounts
from .gates import Gate
from .interface import Listener, Place
from .over import Over, room_among
from .rooms import Room
from .verdict import Verdict


@attrs.define(eq=False)
class Kept:
    """A worker that is kept for a request that presses.

    Attributes:
        worker: Which; "" for none.
        closed: Others fill it: it takes none of them until this has changed.
        refused: Those that did not take it when they were idle.
    """

    worker: WorkerId = ""
    closed: bool = False
    refused: set[WorkerId] = attrs.field(factory=set)


def _listed(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, Iterable):
        raise PolicyError(f"FlowControl takes lists of gates and rooms: {shown(value)}")
    return tuple(value)


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
        converter=_listed,
        validator=attrs.validators.deep_iterable(kind(Gate)),
    )
    rooms: tuple[Room, ...] = attrs.field(
        default=(),
        converter=_listed,
        validator=attrs.validators.deep_iterable(kind(Room)),
    )
    accounts: Accounts | None = attrs.field(
        factory=Accounts,
        validator=attrs.validators.optional(kind(Accounts)),
        repr=False,
    )
    _listeners: tuple[Listener, ...] = attrs.field(init=False, repr=False)
    _kept: dict[RequestId, Kept] = attrs.field(factory=dict, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        accounts = () if self.accounts is None else (self.accounts,)
        self._listeners = (self.order, *self.gates, *self.rooms, *accounts)

    def place(self, request: Request, view: View, since: float) -> Place:
        lanes: tuple[Hashable, ...] = tuple([r.lane(request, view) for r in self.rooms])
        if not any(lanes):
            return self.order.place(request, view, since)
        within = view.seen(lane=(view.lane, lanes))
        place = self.order.place(request, within, since)
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
        open = shared = np.ones(len(view.workers), dtype=np.bool_)
        for each in self.rooms:
            mask = _opened(each, request, share, view)
            open = open & mask
            shared = shared if each.own_lane else shared & mask
        pressing = self.order.pressing
        if not pressing:
            self._kept.clear()
            return room_among(self.order, request, view, open)
        if request.id not in pressing:
            self._keep_out(pressing, open := open.copy(), view)
            return room_among(self.order, request, view, open)
        room = room_among(self.order, request, view, open)
        if not room.any():
            for gone in [id for id in self._kept if id not in pressing]:
                del self._kept[gone]
            kept = self._keep(request, room, view)
            shared = room_among(self.order, request, view, shared)
            ids = view.workers.ids
            kept.closed = kept.worker in ids and not shared[ids.index(kept.worker)]
        return room

    def _keep(self, request: Request, room: Mask, view: View) -> Kept:
        """Keep a worker for one that presses and finds no room.

        Requests of other lanes could keep every worker too full for it for ever,
        so the one that could take it and has least to compute takes nothing else
        while they do.  One that is idle and still closed to it will never take it.
        """
        kept = self._kept.setdefault(request.id, Kept())
        could = np.ones(len(room), dtype=np.bool_)
        for each in self.rooms:
            could = could & each.could(request, view)
        ids, workers = view.workers.ids, view.workers
        idle = (workers.running_requests == 0) & ~room
        if kept.worker in ids and idle[ids.index(kept.worker)]:
            kept.refused.add(kept.worker)
        could &= np.array([id not in kept.refused for id in ids], dtype=np.bool_)
        if kept.worker in ids and could[ids.index(kept.worker)]:
            return kept
        least = np.where(could, workers.prefill_tokens, np.inf)
        kept.worker = ids[int(np.argmin(least))] if could.any() else ""
        return kept

    def _keep_out(
        self, pressing: Collection[RequestId], open: Mask, view: View
    ) -> None:
        """Close, in *open*, what is kept for one that presses."""
        keeps = [self._kept[id] for id in pressing if id in self._kept]
        kept = {each.worker for each in keeps if each.closed}
        for row, worker in enumerate(view.workers.ids):
            if worker in kept:
                open[row] = False

    def opens_at(self, view: View, after: float) -> float:
        rooms = [room.opens_at(view, after) for room in self.rooms]
        return min([self.order.opens_at(view, after), *rooms])

    def admitted(self, request: Request, view: View) -> None:
        self._tell_all("admitted", request, view)

    def queued(self, request: Request, view: View) -> None:
        self._begin("queued", "unqueued", request, view)

    def unqueued(self, request: Request, view: View) -> None:
        self._tell_all("unqueued", request, view)

    def dispatched(self, booking: Booking, view: View) -> None:
        self._begin("dispatched", "ended", booking, view)

    def generated(self, booking: Booking, tokens: int, view: View) -> None:
        self._tell_all("generated", booking, tokens, view)

    def ended(self, booking: Booking, view: View) -> None:
        self._tell_all("ended", booking, view)

    def _tell_all(self, hook: str, *what: Any) -> None:
        """Tell every listener, and raise the first error when all have heard."""
        error: Exception | None = None
        for listener in self._listeners:
            try:
                getattr(listener, hook)(*what)
            except Exception as raised:
                error = error or raised
        if error is not None:
            raise error

    def _begin(self, hook: str, undo: str, *what: Any) -> None:
        """Tell every listener of a beginning; if one raises, none has heard it."""
        for told, listener in enumerate(self._listeners):
            try:
                getattr(listener, hook)(*what)
            except Exception:
                for heard in self._listeners[:told]:
                    with contextlib.suppress(Exception):
                        getattr(heard, undo)(*what)
                raise


def _opened(room: Room, request: Request, share: float, view: View) -> Mask:
    """Ask a room, and check what it says: all of them together would hide it."""
    open: Mask = np.asarray(room.open(request, share, view))
    if open.shape != (len(view.workers),) or open.dtype != np.bool_:
        raise PolicyError(
            f"{type(room).__name__} gave {open.dtype}{open.shape} for"
            f" {len(view.workers)} workers"
        )
    return open
