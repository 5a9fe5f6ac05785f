"""Priority bands, strict, with hold-back and ageing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import attrs

from ..booking import Booking
from ..errors import PolicyError, shown
from ..types import Request, RequestId
from ..view import Mask, View
from .ageing import Ageing
from .amounts import COUNT, a_callable
from .band import Band, OfBand
from .interface import Place, QueueBalancer
from .over import room_among, says
from .rooms import part_of
from .verdict import Verdict

OVERDUE = (-1, "")
"""The flow of the overdue requests whose turn it is."""


def _as_bands(of: Sequence[Band | QueueBalancer]) -> tuple[Band, ...]:
    if isinstance(of, str | bytes) or not isinstance(of, Iterable):
        raise PolicyError(f"Bands.of is {shown(of)}, must be a list of bands")
    bands = [b if isinstance(b, Band) else Band(order=b) for b in of]
    if not bands:
        raise PolicyError("Bands needs at least one band")
    for number, band in enumerate(bands):
        band.name = band.name or str(number)
    names = [band.name for band in bands]
    if len(set(names)) < len(names) or len(set(map(id, bands))) < len(bands):
        raise PolicyError(f"two bands have one name, or are one band: {names}")
    return tuple(bands)


@attrs.define(eq=False)
class Bands(QueueBalancer):
    """Serves the first band that waits, and lets none wait for ever.

    Strict: while a higher band waits for a worker, a lower one does not get
    it.  Two things soften that.  *Hold-back*: a band may fill only its
    ceiling's part of what a worker batches at once, and of the rooms of
    `FlowControl`, at least one request, so that a burst of a higher band finds
    room; a limit of the band's own order is not divided.  *Ageing*: a request
    that has waited for its band's `max_wait` is overdue, and one dispatch in
    *every* goes to whoever is overdue longest, hold-back or not; for the others
    it stays in its place.  Models that share no worker count apart, and one that
    no worker can take now takes nobody's turn.  A request therefore waits at
    most for max_wait and then *every* dispatches for each of those overdue
    before it, and the bands above lose at most one part in *every*.

    Requests of a lower band make place for a higher one while they are
    sheddable, have streamed nothing (or can be resumed) and are not overdue.

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
        default=attrgetter("priority"), validator=a_callable, repr=False
    )
    every: int = attrs.field(default=8, validator=COUNT)
    _ageing: Ageing = attrs.field(init=False, repr=False)
    _restless: list[tuple[int, QueueBalancer]] = attrs.field(init=False, repr=False)
    _moving: list[QueueBalancer] = attrs.field(init=False, repr=False)
    _among: tuple[Callable[[Request], bool], ...] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._ageing = Ageing(self.every)
        numbers = range(len(self.of))
        self._among = tuple([functools.partial(self._is_of, n) for n in numbers])
        # Before every dispatch only those are asked that have something to say.
        orders = [band.order for band in self.of]
        self._restless = [
            (number, order)
            for number, order in enumerate(orders)
            if says(order, "restless")
        ]
        self._moving = [order for order in orders if says(order, "moved")]

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
        elif request.id in self._ageing:
            return Place(due, OVERDUE, below.lane)
        else:
            lane = view.lane, view.waiting.group_of(request), below.lane
            if not self._ageing.add(request, due, lane):
                until = view.now  # begins to wait, overdue as it is: ask again
        return Place(below.key, (number, below.flow), below.lane, until)

    @property
    def restless(self) -> Collection[Hashable]:
        return [
            (number, flow)
            for number, order in self._restless
            for flow in order.restless
        ]

    def tokens_before(self, request: Request, view: View) -> int:
        models = view.workers.models_beside(request.model)
        before = self.of[: self.index(request) + 1]
        return sum(band.backlog.tokens_of(models) for band in before)

    def tokens_ahead(self, request: Request, view: View) -> int:
        number, models = self.index(request), view.workers.models_beside(request.model)
        above = sum(band.backlog.tokens_of(models) for band in self.of[:number])
        band = self.of[number]
        own = band.order.tokens_ahead(request, view)
        return above + min(own, band.backlog.tokens_of(models))

    @property
    def pressing(self) -> Collection[RequestId]:
        """The overdue requests whose turn it is."""
        return self._ageing.chosen

    def opens_at(self, view: View, after: float) -> float:
        return min(band.order.opens_at(view, after) for band in self.of)

    def moved(self, view: View) -> Iterable[RequestId]:
        moved = [id for order in self._moving for id in order.moved(view)]
        moved += self._ageing.moved()
        return moved

    def admit(self, request: Request, view: View) -> Verdict:
        number = self.index(request)
        band = self.of[number]
        check = band.check(request)
        if check is not None:
            return Verdict.of([check])
        alone = OfBand(band.backlog, view.waiting, self._among[number])
        return band.order.admit(request, view.seen(alone))

    def share(self, request: Request, view: View) -> float:
        if request.id in self._ageing:
            return 1.0
        band = self._of(request)
        return band.ceiling * band.order.share(request, view)

    def room(self, request: Request, view: View) -> Mask:
        order, share = self._order(request), self.share(request, view)
        if share == 1.0:
            return order.room(request, view)
        workers = view.workers
        open: Mask = workers.running_requests < part_of(workers.max_running, share)
        return room_among(order, request, view, open)

    def preempts(self, request: Request, view: View) -> bool:
        return self.index(request) < len(self.of) - 1

    def yields(self, booking: Booking, request: Request, view: View) -> bool:
        number = self.index(booking.request)
        if view.now >= booking.since + self.of[number].max_wait:
            return False
        return number > self.index(request)

    def admitted(self, request: Request, view: View) -> None:
        self._order(request).admitted(request, view)

    def queued(self, request: Request, view: View) -> None:
        band = self._of(request)
        band.order.queued(request, view)  # counted only if that went well
        band.count(request, 1)
        self._ageing.enter(request)

    def unqueued(self, request: Request, view: View) -> None:
        band = self._of(request)
        band.count(request, -1)
        self._ageing.leave(request)
        band.order.unqueued(request, view)

    def dispatched(self, booking: Booking, view: View) -> None:
        band = self._of(booking.request)
        band.order.dispatched(booking, view)
        request = booking.request
        self._ageing.sent(request, view.workers.models_beside(request.model))
        band.sent(booking, view.now)

    def generated(self, booking: Booking, tokens: int, view: View) -> None:
        band = self._of(booking.request)
        band.account.output_tokens += tokens
        band.order.generated(booking, tokens, view)

    def ended(self, booking: Booking, view: View) -> None:
        band = self._of(booking.request)
        band.account.running = max(band.account.running - 1, 0)
        band.order.ended(booking, view)

    def _is_of(self, number: int, request: Request) -> bool:
        return self.index(request) == number

    def _of(self, request: Request) -> Band:
        number, of = self.band(request), self.of
        if 0 <= number < len(of):
            return of[number]
        return of[0 if number < 0 else -1]

    def _order(self, request: Request) -> QueueBalancer:
        return self._of(request).order
