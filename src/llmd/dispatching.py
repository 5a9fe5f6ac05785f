"""Sending on what waits: the balancer's order, room, route, announce, book."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heapreplace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from . import commands as c
from .booking import Booking
from .decision import Decision
from .errors import PolicyError, policy_error, shown
from .lane import Entry
from .types import Request, RequestId, WorkerId
from .view import Mask, View
from .waiting import LaneName

if TYPE_CHECKING:
    from .core import Core

T = TypeVar("T")
_MOST_TRIED = 256
"""Bookings taken out of the books to see what room that makes."""


def dispatch(core: Core, lane: LaneName | None = None) -> list[c.Command]:
    """Send on whatever can go, of one lane or of all, in the balancer's order.

    A lane whose head finds no room is closed for this time; the others
    go on, so that no worker idles while a request it could take waits.
    """
    commands = _refresh(core)
    waiting = core.waiting
    if lane is None:
        heads = waiting.ranks()
        heapify(heads)
    else:
        rank = waiting.rank(lane)
        heads = [] if rank is None else [(rank, lane)]
    while heads:
        rank, lane = heads[0]
        now = waiting.rank(lane)
        if now is None:
            heappop(heads)
        elif now != rank:
            heapreplace(heads, (now, lane))
        else:
            sent = _send(core, lane)
            if sent:
                commands += sent
                commands += _refresh(core)
            else:
                heappop(heads)
    return commands


def has_to_wait(core: Core, request: Request) -> bool:
    """Say whether *request* would not be sent on if it came now, or might not be.

    It would be if nothing waits that could go before it, and a worker that can
    serve it has room, or has once less urgent work has made place.
    """
    if core.waiting.tokens_before(request, core.view) > 0:
        return True

    def open() -> bool | None:
        return bool(_room(core, request, _able(core, request)).any()) or None

    if open():
        return False
    found, released = _making_place(core, request, open)
    _put_back(core, released)
    return found is None


def _send(core: Core, lane: LaneName) -> list[c.Command]:
    """Dispatch the head of a lane, or fail it; nothing if it has no room."""
    entry = core.waiting.head(lane)
    assert entry is not None, "sent from an empty lane"
    request = entry.request
    if request.deadline <= core.view.now:
        return core.expire(request.id)
    shed: list[c.Command] = []
    try:
        decision = _place(core, entry)
        if decision is None:
            decision, shed = _shed(core, entry)
            if decision is None:
                return []
        booking = _announce(core, entry, decision)
    except Exception as error:
        core.waiting.remove(request.id, core.view)
        core.gone(request)
        return [*shed, c.Fail(request, policy_error(core.router, error))]
    core.waiting.remove(request.id, core.view)
    core.books.book(booking)
    core.view.totals.uncached_tokens += booking.prefill_tokens
    core.view.advance(core.view.now)
    return [*shed, c.Dispatch(request, decision)]


def _refresh(core: Core) -> list[c.Command]:
    """Let the balancer reorder what waits; fail what it fails on."""
    commands: list[c.Command] = []
    for request, error in core.waiting.refresh(core.view):
        core.gone(request)
        commands.append(c.Fail(request, error))
    return commands


def _place(core: Core, entry: Entry) -> Decision | None:
    """Ask the policies where a request may and should go now."""
    request = entry.request
    view = _able(core, request, entry.failed_on)
    try:
        room = _room(core, request, view)
    except Exception as error:
        raise policy_error(core.balancer, error) from error
    free = view.only(room)
    return core.router.route(request, free) if len(free.workers) else None


def _able(
    core: Core, request: Request, failed_on: frozenset[WorkerId] = frozenset()
) -> View:
    """Return the view of the workers that can serve *request* now."""
    able = core.serving(request)
    if failed_on:
        able = _elsewhere(core, able, failed_on)
    return core.view.only(able)


def _elsewhere(core: Core, able: Mask, failed_on: frozenset[WorkerId]) -> Mask:
    """Leave out workers on which a request failed, unless no other can serve it.

    One that fails fast looks idle, and would get every retry too.
    """
    others = able.copy()
    for worker in failed_on:
        row = core.fleet.row(worker)
        if row is not None:
            others[row] = False
    return others if others.any() else able


def _room(core: Core, request: Request, view: View) -> Mask:
    room: Mask = np.asarray(core.balancer.room(request, view))
    if room.shape != (len(view.workers),) or room.dtype != np.bool_:
        raise PolicyError(
            f"{type(core.balancer).__name__} gave room {room.dtype}{room.shape} for"
            f" {len(view.workers)} workers"
        )
    return room


def _shed(core: Core, entry: Entry) -> tuple[Decision | None, list[c.Command]]:
    """Find a place for a request where less urgent work makes room for it.

    The router chooses among all workers that have room then; who need not have
    made place is put back as it was.
    """
    decision, released = _making_place(core, entry.request, lambda: _place(core, entry))
    if decision is None:
        _put_back(core, released)
        return None, []
    chosen = {decision.first, decision.decode}
    _put_back(core, [b for b in released if chosen.isdisjoint(b.workers)])
    commands: list[c.Command] = []
    for booking in [b for b in released if not b.booked]:
        core.books.book(booking)
        if _has_room(core, entry, chosen):
            continue
        core.books.release(booking)
        aborts = [c.Abort(w, booking.request.id) for w in booking.workers]
        core.settle(booking)
        commands += [*aborts, core.requeue(booking, booking.attempts)]
    return decision, commands


def _making_place(
    core: Core, request: Request, find: Callable[[], T | None]
) -> tuple[T | None, list[Booking]]:
    """Take what yields to *request* out of the books until *find* finds something.

    The newest booking of each worker goes first, which lost the least, then the
    one before it, and so on.

    Returns:
        What was found, and the bookings that are out, newest first.
    """
    released: list[Booking] = []
    found = None
    try:
        while found is None and len(released) < _MOST_TRIED:
            more = _yielding(core, request)
            if not more:
                break
            for booking in more:
                core.books.release(booking)
            released += more
            found = find()
    except BaseException:
        _put_back(core, released)
        raise
    return found, released


def _put_back(core: Core, released: list[Booking]) -> None:
    """Book again what was taken out, in the order in which it came."""
    for booking in reversed(released):
        core.books.book(booking)


def _has_room(core: Core, entry: Entry, chosen: set[WorkerId]) -> bool:
    """Say whether all that a request is to run on have room for it."""
    view = _able(core, entry.request, entry.failed_on)
    room = _room(core, entry.request, view)
    open = {id for id, free in zip(view.workers.ids, room, strict=True) if free}
    return chosen <= open


def _yielding(core: Core, request: Request) -> list[Booking]:
    """Return the newest booking of each worker that makes place for *request*."""
    if not core.balancer.preempts(request, core.view):
        return []
    victims: dict[RequestId, Booking] = {}
    for worker in core.view.workers.ids:
        for booking in core.books.sheddable(worker):
            if core.balancer.yields(booking, request, core.view):
                victims[booking.request.id] = booking
                break
    return [*victims.values()]


def _announce(core: Core, entry: Entry, decision: Decision) -> Booking:
    """Tell the policies of a decision; return what is to be booked.

    The index comes last: what it expects, a booking will settle.
    """
    for worker in (decision.first, decision.decode):
        if worker not in core.fleet:
            name = type(core.router).__name__
            raise PolicyError(f"{name} chose {shown(worker)}: not there")
    request, now = entry.request, core.view.now
    row = core.fleet.row(decision.first)
    held = int(core.view.cached_tokens(request)[row, -1])
    tokens = request.prompt_tokens + entry.generated_tokens
    uncached = max(tokens - held, 1)
    booking = Booking(
        request,
        decision,
        prefill_tokens=uncached,
        context_tokens=tokens,
        generated_tokens=entry.generated_tokens,
        uncached_tokens=uncached,
        since=entry.since,
        attempts=entry.attempts,
        failed_on=entry.failed_on,
        dispatched_at=now,
        again=entry.again,
        number=entry.number,
    )
    try:
        core.balancer.dispatched(booking, core.view)
    except Exception as error:
        raise policy_error(core.balancer, error) from error
    core.waiting.touch(entry.flow)
    core.index.expect(decision.first, request, now)
    if decision.first != decision.decode:
        core.index.expect(decision.decode, request, now)
    return booking
