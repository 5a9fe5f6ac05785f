"""Priority bands, strict, with hold-back and ageing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import attrs
import numpy as np

from ..amounts import a_number, kind
from ..booking import Booking
from ..errors import PolicyError, shown
from ..types import Request, RequestId
from ..view import Mask, View, Waiting
from .accounts import Account
from .ageing import Ageing
from .amounts import COUNT, WAIT, a_callable
from .interface import Place, QueueBalancer
from .orders import Fcfs
from .over import room_among
from .pace import Pace
from .verdict import Check, Verdict

OVERDUE = (-1, "")
"""The flow of the overdue requests whose turn it is."""


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

    name: str = attrs.field(default="", validator=kind(str))
    order: QueueBalancer = attrs.field(factory=Fcfs, validator=kind(QueueBalancer))
    ceiling: float = attrs.field(default=1.0, validator=a_number(above=True, most=1))
    max_wait: float = attrs.field(default=math.inf, validator=WAIT)
    max_requests: float = attrs.field(default=100_000, validator=WAIT)
    max_tokens: float = attrs.field(default=math.inf, validator=WAIT)
    account: Account = attrs.field(factory=Account, init=False, repr=False)
    waiting_requests: int = attrs.field(default=0, init=False)
    waiting_tokens: int = attrs.field(default=0, init=False)
    _models: Counter[str] = attrs.field(factory=Counter, init=False, repr=False)
    _pace: Pace = attrs.field(factory=Pace, init=False, repr=False)

    def check(self, request: Request) -> Check | None:
        """Return why there is no place for another request, if there is none."""
        requests = self.waiting_requests + 1
        tokens = self.waiting_tokens + request.prompt_tokens
        name = f"band {self.name} full"
        if requests > self.max_requests:
            limit, unit = float(self.max_requests), "requests"
            retry = self._pace.each_s if limit else math.nan
            return Check(name, requests, limit, unit, False, "", retry)
        if tokens > self.max_tokens:
            limit, never = self.max_tokens, request.prompt_tokens > self.max_tokens
            retry = math.nan if never else self._pace.each_s
            return Check(name, tokens, limit, "tokens", False, "", retry)
        return None

    def tokens_of(self, models: Collection[str] | None) -> int:
        """Sum of its waiting prompts for any of *models*; None for all."""
        if models is None:
            return self.waiting_tokens
        return sum(self._models[model] for model in models if model in self._models)

    def count(self, request: Request, by: int) -> None:
        """Count a request that begins or ceases to wait."""
        self.waiting_requests += by
        self.waiting_tokens += by * request.prompt_tokens
        model, models = request.model, self._models
        models[model] += by * request.prompt_tokens
        if not models[model]:
            del models[model]
        self.account.waiting = self.waiting_requests

    def sent(self, booking: Booking, at: float) -> None:
        """Note a dispatch."""
        self._pace.count(at)
        self.account.sent(booking, at)


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
class _OfBand:
    """The requests of one band that wait: the whole queue to the band's order."""

    band: Band
    number: int
    bands: Bands
    all: Waiting

    def __len__(self) -> int:
        return self.band.waiting_requests

    def __iter__(self) -> Iterator[Request]:
        of, number = self.bands.index, self.number
        return (request for request in self.all if of(request) == number)

    @property
    def prompt_tokens(self) -> int:
        return self.band.waiting_tokens

    def tokens_before(self, request: Request, view: View) -> int:
        return self.all.tokens_before(request, view)

    def of_model(self, model: str) -> int:
        return sum(request.model == model for request in self)

    def tokens_of(self, models: Collection[str] | None) -> int:
        return self.band.tokens_of(models)

    def since(self, id: RequestId) -> float | None:
        return self.all.since(id)


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
    it stays in its place.  Each model and adapter counts for itself.  A request
    therefore waits at most for max_wait and then *every* dispatches of its
    model and adapter for each of those overdue before it, and the bands above
    lose at most one part in *every*.

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

    def __attrs_post_init__(self) -> None:
        self._ageing = Ageing(self.every)

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
        elif not self._ageing.add(request, due):
            until = view.now  # begins to wait, overdue as it is: ask again
        return Place(below.key, (number, below.flow), below.lane, until)

    @property
    def restless(self) -> Collection[Hashable]:
        return [
            (number, flow)
            for number, band in enumerate(self.of)
            for flow in band.order.restless
        ]

    def tokens_before(self, request: Request, view: View) -> int:
        models = view.workers.models_beside(request.model)
        before = self.of[: self.index(request) + 1]
        return sum(band.tokens_of(models) for band in before)

    @property
    def pressing(self) -> Collection[RequestId]:
        """The overdue requests whose turn it is."""
        return self._ageing.chosen

    def opens_at(self, view: View) -> float:
        return min(band.order.opens_at(view) for band in self.of)

    def moved(self, view: View) -> Iterable[RequestId]:
        moved = [id for band in self.of for id in band.order.moved(view)]
        moved += self._ageing.moved()
        return moved

    def admit(self, request: Request, view: View) -> Verdict:
        number = self.index(request)
        band = self.of[number]
        check = band.check(request)
        if check is not None:
            return Verdict.of([check])
        alone = view.waited(_OfBand(band, number, self, view.waiting))
        return band.order.admit(request, alone)

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
        open: Mask = workers.running_requests < np.ceil(workers.max_running * share)
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
        self._ageing.sent(booking.request)
        band.sent(booking, view.now)

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
