"""Priority bands, strict, with hold-back and ageing."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from operator import attrgetter
from typing import Any, TypeAlias

import attrs
import numpy as np

from ..amounts import a_number, kind
from ..booking import Booking
from ..errors import PolicyError
from ..types import Request, RequestId
from ..view import Mask, View
from .accounts import Account
from .amounts import COUNT, WAIT
from .interface import Place, QueueBalancer
from .orders import Fcfs
from .over import room_among
from .pace import Pace
from .verdict import Check, Verdict

_Line: TypeAlias = tuple[float, int, RequestId]
OVERDUE = (-1, "")
"""The flow of the one overdue request whose turn it is."""


@attrs.define(eq=False, kw_only=True)
class Band:
    """One of `Bands`.

    Attributes:
        name: For figures and refusals.
        order: Orders its requests.
        ceiling: Part of a worker's room it may fill, in (0, 1]; the rest is
            held back for bands above.
        max_wait: Seconds after which a request is overdue.
        max_requests: Requests of it that wait at once, at most.
        max_tokens: Prompt tokens of it that wait at once, at most.
        account: What it has had so far.

    >>> Band(name="batch", ceiling=0.8, max_wait=60.0).max_requests
    100000
    """

    name: str = ""
    order: QueueBalancer = attrs.field(factory=Fcfs, validator=kind(QueueBalancer))
    ceiling: float = attrs.field(default=1.0, validator=a_number(above=True, most=1))
    max_wait: float = attrs.field(default=math.inf, validator=WAIT)
    max_requests: float = attrs.field(default=100_000, validator=WAIT)
    max_tokens: float = attrs.field(default=math.inf, validator=WAIT)
    account: Account = attrs.field(factory=Account, init=False, repr=False)
    waiting_requests: int = attrs.field(default=0, init=False)
    waiting_tokens: int = attrs.field(default=0, init=False)
    _pace: Pace = attrs.field(factory=Pace, init=False, repr=False)

    def check(self, request: Request) -> Check | None:
        """Return why there is no place for another request, if there is none."""
        requests = self.waiting_requests + 1
        tokens = self.waiting_tokens + request.prompt_tokens
        name = f"band {self.name} full"
        if requests > self.max_requests:
            limit, unit = float(self.max_requests), "requests"
            return Check(name, requests, limit, unit, False, "", self._pace.each_s)
        if tokens > self.max_tokens:
            limit = self.max_tokens
            return Check(name, tokens, limit, "tokens", False, "", self._pace.each_s)
        return None

    def count(self, request: Request, by: int) -> None:
        """Count a request that begins or ceases to wait."""
        self.waiting_requests += by
        self.waiting_tokens += by * request.prompt_tokens
        self.account.waiting = self.waiting_requests

    def sent(self, booking: Booking, at: float) -> None:
        """Note a dispatch."""
        self._pace.count(at)
        self.account.sent(booking, at)


def _as_bands(of: Sequence[Band | QueueBalancer]) -> tuple[Band, ...]:
    bands = [b if isinstance(b, Band) else Band(order=b) for b in of]
    for number, band in enumerate(bands):
        band.name = band.name or str(number)
    if not bands:
        raise PolicyError("Bands needs at least one band")
    return tuple(bands)


@attrs.define(eq=False)
class Overdue:
    """Requests that have waited too long, the longest overdue first.

    Each call is O(log n), amortised: what left is passed over.

    >>> overdue = Overdue()
    >>> overdue.add("b", 2.0), overdue.add("a", 1.0), overdue.longest()
    (None, None, 'a')
    >>> overdue.drop("a"), overdue.longest()
    (None, 'b')
    """

    _lines: dict[RequestId, _Line] = attrs.field(factory=dict, init=False)
    _heap: list[_Line] = attrs.field(factory=list, init=False)
    _added: int = attrs.field(default=0, init=False)

    def add(self, id: RequestId, due: float) -> None:
        """Note a request; one that is known already keeps its place."""
        if id in self._lines:
            return
        self._added += 1
        line = self._lines[id] = due, self._added, id
        heappush(self._heap, line)
        if len(self._heap) > 2 * len(self._lines) + 64:
            self._heap = [*self._lines.values()]
            heapify(self._heap)

    def drop(self, id: RequestId) -> None:
        """Forget a request that waits no more."""
        self._lines.pop(id, None)

    def longest(self) -> RequestId | None:
        """Return the one overdue longest; None if none is."""
        heap = self._heap
        while heap:
            line = heap[0]
            if self._lines.get(line[2]) is line:
                return line[2]
            heappop(heap)
        return None


@attrs.define(eq=False)
class Bands(QueueBalancer):
    """Serves the first band that waits, and lets none wait for ever.

    Strict: while a higher band waits for a worker, a lower one does not get
    it.  Two things soften that.  *Hold-back*: a band may fill only its
    ceiling's part of a worker, at least one request, so that a burst of a
    higher band finds room.  *Ageing*: a request that has waited for its
    band's `max_wait` is overdue, and one dispatch in *every* goes to whoever
    is overdue longest, hold-back or not; for the others it stays in its place.
    A request therefore waits at most for max_wait and then *every* dispatches
    for each of those overdue before it, and the bands above lose at most one
    part in *every*.

    Requests of a lower band make place for a higher one while they are
    sheddable, have streamed nothing and are not overdue.

    Attributes:
        of: The bands, highest first; a balancer stands for a band with no
            limits.
        band: Which band a request is of; its priority, unless given, as vLLM
            counts (smaller first).
        every: Dispatches of which one goes to an overdue request.

    >>> bands = Bands([Band(name="chat"), Band(name="batch", max_wait=60.0)])
    >>> bands.index(Request(id="r", prompt=[1], priority=7))
    1
    """

    of: tuple[Band, ...] = attrs.field(converter=_as_bands)
    band: Callable[[Request], int] = attrs.field(
        default=attrgetter("priority"), repr=False
    )
    every: int = attrs.field(default=8, validator=COUNT)
    _since_overdue: int = attrs.field(default=0, init=False)
    _overdue: Overdue = attrs.field(factory=Overdue, init=False, repr=False)
    _chosen: RequestId | None = attrs.field(default=None, init=False, repr=False)
    _restless: tuple[Hashable, ...] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._restless = tuple(
            [
                (number, flow)
                for number, band in enumerate(self.of)
                for flow in band.order.restless
            ]
        )

    def index(self, request: Request) -> int:
        """Return the number of a request's band; beyond the ends, the nearest."""
        number = self.band(request)
        if 0 <= number < len(self.of):
            return number
        return 0 if number < 0 else len(self.of) - 1

    def key(self, request: Request, view: View) -> Any:
        return self._order(request).key(request, view)

    def flow(self, request: Request) -> Hashable:
        number = self.index(request)
        return number, self.of[number].order.flow(request)

    def turn(self, flow: Any, view: View) -> Any:
        if flow == OVERDUE:
            return (-1,)
        number, below = flow
        return number, self.of[number].order.turn(below, view)

    def place(self, request: Request, view: View, since: float) -> Place:
        number = self.index(request)
        band = self.of[number]
        below = band.order.place(request, view, since)
        due, until = since + band.max_wait, below.until
        if view.now < due:
            until = min(until, due)
        elif request.id == self._chosen:
            return Place(due, OVERDUE, below.lane)
        else:
            self._overdue.add(request.id, due)
        return Place(below.key, (number, below.flow), below.lane, until)

    @property
    def restless(self) -> Collection[Hashable]:
        return self._restless

    def tokens_before(self, request: Request, view: View) -> int:
        before = self.of[: self.index(request) + 1]
        return sum(band.waiting_tokens for band in before)

    @property
    def pressing(self) -> RequestId | None:
        """The overdue request whose turn it is."""
        return self._chosen

    def moved(self, view: View) -> Iterable[RequestId]:
        moved = [id for band in self.of for id in band.order.moved(view)]
        turn = self._since_overdue + 1 >= self.every
        chosen = self._overdue.longest() if turn else None
        if chosen != self._chosen:
            moved += [id for id in (self._chosen, chosen) if id is not None]
            self._chosen = chosen
        return moved

    def admit(self, request: Request, view: View) -> Verdict:
        band = self._of(request)
        check = band.check(request)
        if check is not None:
            return Verdict.of([check])
        return band.order.admit(request, view)

    def share(self, request: Request, view: View) -> float:
        band = self._of(request)
        since = view.waiting.since(request.id)
        if since is not None and view.now >= since + band.max_wait:
            return 1.0
        return band.ceiling * band.order.share(request, view)

    def room(self, request: Request, view: View) -> Mask:
        order, share = self._order(request), self.share(request, view)
        if share == 1.0:
            return order.room(request, view)
        workers = view.workers
        open: Mask = workers.running_requests < np.ceil(workers.max_running * share)
        return room_among(order, request, view, open)

    def yields(self, booking: Booking, request: Request, view: View) -> bool:
        number = self.index(booking.request)
        if view.now >= booking.since + self.of[number].max_wait:
            return False
        return number > self.index(request)

    def admitted(self, request: Request, view: View) -> None:
        self._order(request).admitted(request, view)

    def queued(self, request: Request, view: View) -> None:
        band = self._of(request)
        band.count(request, 1)
        band.order.queued(request, view)

    def unqueued(self, request: Request, view: View) -> None:
        band = self._of(request)
        band.count(request, -1)
        self._overdue.drop(request.id)
        band.order.unqueued(request, view)

    def dispatched(self, booking: Booking, view: View) -> None:
        band = self._of(booking.request)
        self._since_overdue += 1
        if booking.request.id == self._chosen:
            self._since_overdue, self._chosen = 0, None
        band.sent(booking, view.now)
        band.order.dispatched(booking, view)

    def generated(self, booking: Booking, tokens: int, view: View) -> None:
        band = self._of(booking.request)
        band.account.output_tokens += tokens
        band.order.generated(booking, tokens, view)

    def ended(self, booking: Booking, view: View) -> None:
        band = self._of(booking.request)
        band.account.running = max(band.account.running - 1, 0)
        band.order.ended(booking, view)

    def _of(self, request: Request) -> Band:
        number, of = self.band(request), self.of
        if 0 <= number < len(of):
            return of[number]
        return of[0 if number < 0 else -1]

    def _order(self, request: Request) -> QueueBalancer:
        return self._of(request).order
