"""One priority band: its limits, and what waits of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterator

import attrs

from ..amounts import a_number, kind
from ..booking import Booking
from ..types import Request, RequestId
from ..view import View, Waiting
from .accounts import Account
from .amounts import WAIT
from .interface import QueueBalancer
from .orders import Fcfs
from .pace import Pace
from .verdict import Check


@attrs.define(eq=False)
class Backlog:
    """How many requests of a band wait, and the tokens of their prompts.

    >>> backlog = Backlog()
    >>> backlog.count(Request(id="r", prompt=[1, 2], model="m"), 1)
    >>> backlog.requests, backlog.tokens_of({"m"}), backlog.tokens_of({"n"})
    (1, 2, 0)
    """

    requests: int = 0
    tokens: int = 0
    _models: dict[str, int] = attrs.field(factory=dict, init=False)

    def count(self, request: Request, by: int) -> None:
        """Count a request that begins (1) or ceases (-1) to wait."""
        tokens, model, models = by * request.prompt_tokens, request.model, self._models
        self.requests += by
        self.tokens += tokens
        left = models.get(model, 0) + tokens
        if left:
            models[model] = left
        else:
            del models[model]

    def tokens_of(self, models: Collection[str] | None) -> int:
        """Sum of the prompts for any of *models*; None for all."""
        if models is None:
            return self.tokens
        return sum(self._models[model] for model in models if model in self._models)


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
        backlog: What waits of it.

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
    backlog: Backlog = attrs.field(factory=Backlog, init=False, repr=False)
    _pace: Pace = attrs.field(factory=Pace, init=False, repr=False)

    @property
    def waiting_requests(self) -> int:
        """How many of it wait."""
        return self.backlog.requests

    @property
    def waiting_tokens(self) -> int:
        """Sum of the prompts that do."""
        return self.backlog.tokens

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

    def count(self, request: Request, by: int) -> None:
        """Count a request that begins or ceases to wait."""
        self.backlog.count(request, by)
        self.account.waiting = self.backlog.requests

    def sent(self, booking: Booking, at: float) -> None:
        """Note a dispatch."""
        self._pace.count(at)
        self.account.sent(booking, at)


@attrs.define(eq=False)
class OfBand:
    """What waits of a band: all that there is, to the order of that band.

    Attributes:
        backlog: Of the band.
        all: What waits of all bands.
        among: Whether a request is of the band.
    """

    backlog: Backlog
    all: Waiting
    among: Callable[[Request], bool]

    def __len__(self) -> int:
        return self.backlog.requests

    def __iter__(self) -> Iterator[Request]:
        return filter(self.among, self.all)

    @property
    def prompt_tokens(self) -> int:
        """Sum of their prompts."""
        return self.backlog.tokens

    def tokens_before(self, request: Request, view: View) -> int:
        """Sum of the prompts that would be sent before *request*, at most."""
        return self.all.tokens_before(request, view)

    def tokens_ahead(self, request: Request, view: View) -> int:
        """Sum of the prompts expected to be sent before *request*."""
        return self.all.tokens_ahead(request, view)

    def of_model(self, model: str) -> int:
        """Count those for *model*."""
        return sum(request.model == model for request in self)

    def tokens_of(self, models: Collection[str] | None) -> int:
        """Sum of the prompts for any of *models*; None for all."""
        return self.backlog.tokens_of(models)

    def group_of(self, request: Request) -> Hashable:
        """Return what keeps *request* apart whatever a balancer says."""
        return self.all.group_of(request)

    def since(self, id: RequestId) -> float | None:
        """Return when a waiting request arrived; None if it does not wait."""
        return self.all.since(id)
