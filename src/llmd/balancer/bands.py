"""Priority bands, strict, with hold-back and ageing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import attrs
import numpy as np

from ..booking import Booking
from ..errors import PolicyError, shown
from ..types import Request, RequestId
from ..view import Mask, View
from .interface import Place, QueueBalancer
from .orders import Fcfs
from .over import room_among
from .verdict import Check, Verdict

OVERDUE = (-1, "")


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

    >>> Band(name="batch", ceiling=0.8, max_wait=60.0).max_requests
    100000
    """

    name: str = ""
    order: QueueBalancer = attrs.field(factory=Fcfs)
    ceiling: float = 1.0
    max_wait: float = math.inf
    max_requests: int = 100_000
    max_tokens: float = math.inf
    waiting_requests: int = attrs.field(default=0, init=False)
    waiting_tokens: int = attrs.field(default=0, init=False)
    _sent_at: deque[float] = attrs.field(
        factory=lambda: deque(maxlen=33), init=False, repr=False
    )

    def __attrs_post_init__(self) -> None:
        if not 0 < self.ceiling <= 1:
            raise PolicyError(f"a ceiling is {shown(self.ceiling)}, must be in (0, 1]")

    def check(self, request: Request) -> Check | None:
        """Return why there is no place for another request, if there is none."""
        requests = self.waiting_requests + 1
        tokens = self.waiting_tokens + request.prompt_tokens
        name = f"band {self.name} full"
        if requests > self.max_requests:
            limit, unit = float(self.max_requests), "requests"
            return Check(name, requests, limit, unit, False, "", self._pace())
        if tokens > self.max_tokens:
            limit = self.max_tokens
            return Check(name, tokens, limit, "tokens", False, "", self._pace())
        return None

    def count(self, request: Request, by: int) -> None:
        """Count a request that begins or ceases to wait."""
        self.waiting_requests += by
        self.waiting_tokens += by * request.prompt_tokens

    def sent(self, at: float) -> None:
        """Note a dispatch."""
        self._sent_at.append(at)

    def _pace(self) -> float:
        """Return the seconds between its last dispatches; NaN if too few."""
        times = self._sent_at
        if len(times) < 2 or times[-1] == times[0]:
            return math.nan
        return (times[-1] - times[0]) / (len(times) - 1)


def _as_bands(of: Sequence[Band | QueueBalancer]) -> tuple[Band, ...]:
    bands = [b if isinstance(b, Band) else Band(order=b) for b in of]
    for number, band in enumerate(bands):
        band.name = band.name or str(number)
    if not bands:
        raise PolicyError("Bands needs at least one band")
    return tuple(bands)


@attrs.define(eq=False)
class Bands(QueueBalancer):
    """Serves the first band that waits, and lets none wait for ever.

    Strict: while a higher band waits for a worker, a lower one does not get
    it.  Two things soften that.  *Hold-back*: a band may fill only its
    ceiling's part of a worker, at least one request, so that a burst of a
    higher band finds room.  *Ageing*: a request that has waited for its
    band's `max_wait` is overdue, and one dispatch in *every* goes to whoever
    is overdue longest, hold-back or not.  A request therefore waits at most
    for max_wait and then *every* dispatches for each of those overdue before
    it, and the bands above lose at most one part in *every*.

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
    every: int = 8
    _since_overdue: int = attrs.field(default=0, init=False)
    _restless: tuple[Hashable, ...] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        below = [
            (number, flow)
            for number, band in enumerate(self.of)
            for flow in band.order.restless
        ]
        self._restless = (OVERDUE, *below)

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
            return (-1,) if self._since_overdue + 1 >= self.every else (len(self.of),)
        number, below = flow
        return number, self.of[number].order.turn(below, view)

    def place(self, request: Request, view: View, since: float) -> Place:
        number = self.index(request)
        band = self.of[number]
        below = band.order.place(request, view, since)
        due = since + band.max_wait
        if view.now >= due:
            return Place(due, OVERDUE, below.lane)
        return Place(below.key, (number, below.flow), below.lane, min(below.until, due))

    @property
    def restless(self) -> Collection[Hashable]:
        """The flow of overdue requests, whose turn the others' dispatches bring."""
        return self._restless

    def moved(self, view: View) -> Iterable[RequestId]:
        return [id for band in self.of for id in band.order.moved(view)]

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
        band.order.unqueued(request, view)

    def dispatched(self, booking: Booking, view: View) -> None:
        band = self._of(booking.request)
        overdue = view.now >= booking.since + band.max_wait
        self._since_overdue = 0 if overdue else self._since_overdue + 1
        band.sent(view.now)
        band.order.dispatched(booking, view)

    def generated(self, booking: Booking, tokens: int, view: View) -> None:
        self._order(booking.request).generated(booking, tokens, view)

    def ended(self, booking: Booking, view: View) -> None:
        self._order(booking.request).ended(booking, view)

    def _of(self, request: Request) -> Band:
        number, of = self.band(request), self.of
        if 0 <= number < len(of):
            return of[number]
        return of[0 if number < 0 else -1]

    def _order(self, request: Request) -> QueueBalancer:
        return self._of(request).order
