"""Sending on what waits: the balancer's order, room, route, announce, book."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heapreplace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from . import commands as c
from .booking import Booking
from .decision import Decision
from .errors import PolicyError, policy_error, shown
from .lane import Entry, Rank
from .types import Request, RequestId, Role, WorkerId
from .view import Mask, View
from .waiting import LaneName

if TYPE_CHECKING:
    from .core import Core

T = TypeVar("T")
_MOST_TRIED = 1024
"""Bookings taken out of the books to see what room that makes."""
_MOST_PASSES = 8
"""Over the lanes for the sake of what made place, which may make others do so."""


def dispatch(core: Core, lane: LaneName | None = None) -> list[c.Command]:
    """Send on whatever can go, of one lane or of all, in the balancer's order.

    A lane whose head finds no room is closed for this time; the others
    go on, so that no worker idles while a request it could take waits.
    """
    commands = _refresh(core)
    sent: list[c.Command] = []
    if lane is not None:
        sent = _pass(core, [lane])
    # Whoever presses may have room by that alone, in whatever lane.
    if lane is None or core.balancer.pressing:
        sent += _pass(core, None)
    commands += sent
    for _ in range(_MOST_PASSES):
        # What made place may find another.
        if not any(isinstance(command, c.Requeue) for command in sent):
            break
        sent = _pass(core, None)
        commands += sent
    return commands


def _pass(core: Core, lanes: Sequence[LaneName] | None) -> list[c.Command]:
    """Send on heads of lanes, the first by rank first, until none finds room."""
    commands: list[c.Command] = []
    if lanes is None:
        lanes = [name for _, name in core.waiting.ranks()]
    try:
        _by_rank(core, lanes, commands, lambda rank: rank)
    except TypeError as error:
        # Ranks of different lanes do not compare: go by arrival.
        core.waiting.faults.append(policy_error(core.balancer, error))
        _by_rank(core, lanes, commands, lambda rank: rank[2])
    return commands


def _by_rank(
    core: Core,
    lanes: Sequence[LaneName],
    commands: list[c.Command],
    key: Callable[[Rank], Any],
) -> None:
    waiting = core.waiting
    ranks = [(waiting.rank(lane), lane) for lane in lanes]
    heads = [(key(rank), lane) for rank, lane in ranks if rank is not None]
    heapify(heads)
    while heads:
        rank, lane = heads[0]
        now = waiting.rank(lane)
        if now is None:
            heappop(heads)
        elif key(now) != rank:
            heapreplace(heads, (key(now), lane))
        else:
            sent = _send(core, lane)
            if sent:
                commands += sent
                commands += _refresh(core)
            else:
                heappop(heads)


def has_to_wait(core: Core, request: Request) -> bool:
    """Say whether *request* would not be sent on if it came now, or might not be.

    It would be if nothing waits that could go before it, and a worker that can
    serve it has room, or has once less urgent work has made place.
    """
    if core.waiting.presses(request, core.view):
        return True
    if core.waiting.tokens_before(request, core.view) > 0:
        return True

    def open() -> bool | None:
        return bool(_room(core, request, _able(core, request)).any()) or None

    if open():
        return False
    found, released = _making_place(core, request, open)
    core.books.put_back(released)
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

    One that fails fast looks idle, and would get every retry too.  It takes who
    computes its prompt and who answers: the last that can do either stays in.
    """
    others = able.copy()
    for worker in failed_on:
        row = core.fleet.row(worker)
        if row is not None:
            others[row] = False
    workers = core.fleet.workers
    for role in (Role.PREFILL, Role.DECODE):
        can = able & workers.able(role)
        if not (others & can).any():
            others |= can
    return others


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
        core.books.put_back(released)
        return None, []
    try:
        shed = _needed(core, entry, {decision.first, decision.decode}, released)
    except BaseException:
        core.books.put_back([booking for booking in released if not booking.booked])
        raise
    commands: list[c.Command] = []
    for booking in shed:
        aborts = [c.Abort(worker, booking.request.id) for worker in booking.workers]
        core.settle(booking)
        commands += [*aborts, core.requeue(booking, booking.attempts)]
    # What they were to leave in the caches is no more hoped for.
    core.view.advance(core.view.now)
    return decision, commands


def _needed(
    core: Core, entry: Entry, chosen: set[WorkerId], released: list[Booking]
) -> list[Booking]:
    """Return those of *released* without which there is no room on *chosen*."""
    needed = []
    core.books.put_back([b for b in released if chosen.isdisjoint(b.workers)])
    for booking in [b for b in released if not b.booked]:
        core.books.put_back([booking])
        if not _has_room(core, entry, chosen):
            core.books.release(booking)
            needed.append(booking)
    return needed


def _making_place(
    core: Core, request: Request, find: Callable[[], T | None]
) -> tuple[T | None, list[Booking]]:
    """Take what yields to *request* out of the books until *find* finds something.

    Of each worker the least urgent goes first, of equals the newest, which lost
    the least; then two more, and so on.

    Returns:
        What was found, and the bookings that are out, newest first.
    """
    released: list[Booking] = []
    found, many = None, 1
    try:
        while found is None and len(released) < _MOST_TRIED:
            more = _yielding(core, request, many)
            if not more:
                break
            for booking in more:
                core.books.release(booking)
            released += more
            found, many = find(), 2 * many
    except BaseException:
        core.books.put_back(released)
        raise
    return found, released


def _has_room(core: Core, entry: Entry, chosen: set[WorkerId]) -> bool:
    """Say whether all that a request is to run on have room for it."""
    view = _able(core, entry.request, entry.failed_on)
    try:
        room = _room(core, entry.request, view)
    except Exception as error:
        raise policy_error(core.balancer, error) from error
    open = {id for id, free in zip(view.workers.ids, room, strict=True) if free}
    return chosen <= open


def _yielding(core: Core, request: Request, many: int) -> list[Booking]:
    """Return what makes place for *request*: of each worker the least urgent."""
    balancer, view = core.balancer, core.view
    victims: dict[RequestId, Booking] = {}
    try:
        if not balancer.preempts(request, view):
            return []
        for worker in _able(core, request).workers.ids:
            yielding = [
                booking
                for booking in core.books.sheddable(worker)
                if balancer.yields(booking, request, view)
            ]
            # The least urgent first; of equals the newest, as they come.
            yielding.sort(key=lambda booking: -booking.request.priority)
            for booking in yielding[:many]:
                victims[booking.request.id] = booking
    except Exception as error:
        raise policy_error(balancer, error) from error
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
