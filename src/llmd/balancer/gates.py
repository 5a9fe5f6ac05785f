"""Who may enter: gates, which compose by all having to let a request in."""

from __future__ import annotations

import abc
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import islice
from operator import attrgetter

import attrs
import numpy as np

from ..amounts import kind
from ..booking import Booking
from ..errors import PolicyError
from ..machines import Machine
from ..router.interface import Router
from ..router.seconds import EarliestFirstToken
from ..types import Request
from ..view import View
from .amounts import COUNT_LIMIT, LIMIT, POSITIVE, WAIT, a_callable, weights
from .interface import Listener
from .pace import Pace
from .verdict import Check

_tenant: Callable[[Request], Hashable] = attrgetter("tenant")


class Gate(Listener, abc.ABC):
    """Lets a request in or not; what it counts, it counts in the hooks.

    >>> class NoNovels(Gate):
    ...     def check(self, request, share, view):
    ...         tokens = request.prompt_tokens
    ...         return Check("novel", tokens, 99_999, "tokens", tokens < 99_999)
    """

    @abc.abstractmethod
    def check(self, request: Request, share: float, view: View) -> Check:
        """Measure, compare and say what came of it; change nothing.

        Args:
            request: Who wants to enter.
            share: What part of the room it may fill, in (0, 1].
            view: The whole fleet.
        """


@attrs.define(eq=False, kw_only=True)
class QueueFull(Gate):
    """Refuses more than so many waiting requests and prompt tokens, in all.

    Who is refused is told to come back when another has been sent on, at the
    pace of the last dispatches; who can never enter, not at all.

    >>> QueueFull(requests=500).tokens
    inf
    """

    requests: float = attrs.field(default=math.inf, validator=WAIT)
    tokens: float = attrs.field(default=math.inf, validator=WAIT)
    _pace: Pace = attrs.field(factory=Pace, init=False, repr=False)

    def check(self, request: Request, share: float, view: View) -> Check:
        waiting, own = view.waiting, request.prompt_tokens
        # What is nearer to its limit, or further beyond it.
        value, limit, unit = max(
            (float(len(waiting) + 1), self.requests, "requests"),
            (float(waiting.prompt_tokens + own), self.tokens, "tokens"),
            key=lambda each: each[0] / each[1] if each[1] else math.inf,
        )
        passed, never = value <= limit, not self.requests or own > self.tokens
        retry = math.nan if passed or never else self._pace.each_s
        return Check("queue full", value, limit, unit, passed, "", retry)

    def dispatched(self, booking: Booking, view: View) -> None:
        self._pace.count(view.now)


@attrs.define
class _Bucket:
    requests: float
    tokens: float
    at: float


@attrs.define(eq=False, kw_only=True)
class RateLimit(Gate):
    """Token buckets for each tenant: requests and tokens a minute.

    A bucket holds *burst_s* seconds' worth and fills steadily.  A request
    takes one and its prompt on entry, its output as it is generated, which
    may overdraw the tokens.  Buckets are forgotten when they are full again;
    of more than *max_tenants*, the oldest are forgotten first.

    Attributes:
        requests_per_min: For each tenant.
        tokens_per_min: For each tenant, prompt and output.
        burst_s: Seconds of it that may be used at once.
        weights: What a tenant may use relative to 1.0 of others.
        tenant: Whom a request belongs to.
        max_tenants: Buckets remembered.

    >>> RateLimit(requests_per_min=60.0).tokens_per_min
    inf
    """

    requests_per_min: float = attrs.field(default=math.inf, validator=LIMIT)
    tokens_per_min: float = attrs.field(default=math.inf, validator=LIMIT)
    burst_s: float = attrs.field(default=60.0, validator=POSITIVE)
    weights: dict[Hashable, float] = attrs.field(factory=dict, validator=weights)
    tenant: Callable[[Request], Hashable] = attrs.field(
        default=_tenant, validator=a_callable, repr=False
    )
    max_tenants: float = attrs.field(default=10_000, validator=COUNT_LIMIT)
    _buckets: OrderedDict[Hashable, _Bucket] = attrs.field(
        factory=OrderedDict, init=False, repr=False
    )

    def __attrs_post_init__(self) -> None:
        least = min(self.weights.values(), default=1.0)
        holds = self.requests_per_min * self.burst_s / 60.0 * min(least, 1.0)
        if holds < 1.0 - 1e-9:
            raise PolicyError(
                f"{type(self).__name__}.requests_per_min is {self.requests_per_min}:"
                f" the smallest bucket holds {holds:g} requests, must hold 1"
            )

    def check(self, request: Request, share: float, view: View) -> Check:
        tenant = self.tenant(request)
        bucket = self._filled(tenant, view.now)
        weight = self.weights.get(tenant, 1.0) / 60.0
        # What a bucket lacks, and at what rate it fills.
        lacks = (
            (1.0 - bucket.requests, self.requests_per_min * weight, "requests"),
            (
                min(request.prompt_tokens, self._size(tenant)) - bucket.tokens,
                self.tokens_per_min * weight,
                "tokens",
            ),
        )
        lack, rate, unit = max(
            lacks,
            key=lambda each: each[0] / each[1] if each[1] < math.inf else -math.inf,
        )
        limit, unit = rate * 60.0, f"{unit} a minute"
        value = max(limit + lack, 0.0) if limit < math.inf else 0.0
        if lack <= 1e-9 or rate == math.inf:
            return Check("rate limit", min(value, limit), limit, unit, True)
        name = f"rate limit of {tenant!r}"
        return Check(name, value, limit, unit, False, "", lack / rate)

    def admitted(self, request: Request, view: View) -> None:
        self._take(self.tenant(request), 1.0, request.prompt_tokens, view.now)

    def generated(self, booking: Booking, tokens: int, view: View) -> None:
        self._take(self.tenant(booking.request), 0.0, tokens, view.now)

    def _size(self, tenant: Hashable) -> float:
        weight = self.weights.get(tenant, 1.0) * self.burst_s / 60.0
        return self.tokens_per_min * weight

    def _filled(self, tenant: Hashable, now: float) -> _Bucket:
        """Return what a tenant's bucket holds now; changes nothing."""
        bucket = self._buckets.get(tenant)
        rate = self.weights.get(tenant, 1.0) / 60.0
        requests = self.requests_per_min * rate * self.burst_s
        if bucket is None:
            return _Bucket(requests, self._size(tenant), now)
        # An endless bucket gained for no time at all is still full.
        gained = max(now - bucket.at, 0.0)
        return _Bucket(
            _fill(bucket.requests, self.requests_per_min * rate, gained, requests),
            _fill(
                bucket.tokens,
                self.tokens_per_min * rate,
                gained,
                self._size(tenant),
            ),
            now,
        )

    def _take(
        self, tenant: Hashable, requests: float, tokens: float, now: float
    ) -> None:
        bucket = self._filled(tenant, now)
        bucket.requests -= requests
        bucket.tokens -= tokens
        # Last in, last forgotten.
        self._buckets.pop(tenant, None)
        self._buckets[tenant] = bucket
        # Of an OrderedDict, as a dict passes over all that was deleted before.
        for oldest in list(islice(self._buckets, 2)):
            held = self._filled(oldest, now)
            weight = self.weights.get(oldest, 1.0) * self.burst_s / 60.0
            full = held.tokens >= self._size(oldest) and (
                held.requests >= self.requests_per_min * weight
            )
            if full or len(self._buckets) > self.max_tenants:
                del self._buckets[oldest]


def _fill(held: float, rate: float, seconds: float, size: float) -> float:
    return size if size == math.inf else min(held + rate * seconds, size)


@attrs.define(eq=False, kw_only=True)
class DeadlineInfeasible(Gate):
    """Refuses whom no worker can give a first token in time.

    Its first token is expected after the prompts that wait here and go before
    it, as its order expects, for models that compete with its own, spread over
    the workers that can serve it, and then what the router says of the best of
    them.  Places and answers that it may have to wait for are not counted, nor
    work that would make place for it; under orders by deadline or length nobody
    is expected before it.  The estimate uses only the cluster's own books, which
    are never stale.

    Attributes:
        router: Prices in seconds to a first token.
        machine: Gives the seconds of the prompts that wait.
        margin: Factor on the estimate, above 1 to refuse earlier.

    >>> DeadlineInfeasible().margin
    1.0
    """

    router: Router = attrs.field(
        factory=lambda: EarliestFirstToken(decode_weight=0.0),
        validator=kind(Router),
        repr=False,
    )
    machine: Machine = attrs.field(factory=Machine, validator=kind(Machine), repr=False)
    margin: float = attrs.field(default=1.0, validator=POSITIVE)

    def check(self, request: Request, share: float, view: View) -> Check:
        if request.deadline == math.inf:
            return Check("deadline", 0.0, math.inf, "s to first token", True)
        left = request.deadline - view.now
        ready = view.able(request)
        if not len(ready.workers):
            note = "no worker is ready for it, not estimated"
            return Check("deadline", 0.0, left, "s to first token", left > 0, note)
        own = float(np.min(self.router.cost(request, ready)))
        queued = _queued_s(request, view, self.machine, len(ready.workers))
        needed = self.margin * (own + queued)
        # As long to answer, once those that wait now are done.
        retry = needed - left if 0 < needed - left <= queued else math.nan
        return Check(
            *("deadline", needed, left, "s to first token", needed <= left),
            retry_after=retry,
        )


@attrs.define(eq=False, kw_only=True)
class Saturation(Gate):
    """Refuses when the workers that could serve a request are full.

    Saturation is the larger of two parts, each 1.0 at its limit: the prompts
    that wait here before it in seconds of work for each of these workers, over
    *max_wait_s*; and the KV usage of the emptiest of them over *max_kv_usage*.
    A request enters while saturation is below its share, so lower bands are
    refused first.

    The engine's own KV figure is used, or the cluster's books if they say
    more.  A figure older than *stale_s* counts as absent: the books alone
    are used, which are never stale, and the check's note says so.  No signal
    stops dispatch: this gate is asked on entry only.

    Attributes:
        max_wait_s: Seconds of prompts waiting for each ready worker.
        max_kv_usage: Of the emptiest worker.
        stale_s: Age at which a report is not believed any more, seconds.
        machine: Gives the seconds that prompts take.

    >>> Saturation(max_wait_s=5.0).stale_s
    10.0
    """

    max_wait_s: float = attrs.field(default=10.0, validator=LIMIT)
    max_kv_usage: float = attrs.field(default=math.inf, validator=LIMIT)
    stale_s: float = attrs.field(default=10.0, validator=WAIT)
    machine: Machine = attrs.field(factory=Machine, validator=kind(Machine), repr=False)

    def check(self, request: Request, share: float, view: View) -> Check:
        workers = view.able(request).workers
        if not len(workers):
            note = "no worker is ready for it, not measured"
            return Check("saturation", 0.0, share, "of 1", True, note)
        wait = _queued_s(request, view, self.machine, len(workers))
        booked = workers.context_tokens / workers.kv_tokens
        stale = ~(view.now - workers.reported_at <= self.stale_s)
        reported = np.where(stale, np.nan, workers.reported_kv_usage)
        kv = float(np.fmax(booked, reported).min())
        value = max(wait / self.max_wait_s, kv / self.max_kv_usage)
        old = int((stale & ~np.isnan(workers.reported_at)).sum())
        note = f"{old} of {len(workers)} reports stale, own books used" if old else ""
        passed = value <= share
        # By then the prompts waiting are down to the share.
        retry = wait - share * self.max_wait_s
        return Check(
            "saturation",
            value,
            share,
            "of 1",
            passed,
            note,
            math.nan if passed or retry <= 0 else retry,
        )


def _queued_s(request: Request, view: View, machine: Machine, workers: int) -> float:
    """Return the seconds of prompts that wait before *request*, for each worker."""
    # At the pace of a prompt of usual length, since only their sum is known.
    seconds_per_token = machine.prefill_s(1024.0) / 1024.0
    return view.waiting.tokens_ahead(request, view) * seconds_per_token / workers
