"""Figures of tenants and bands: who waits, who was served, how evenly."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from operator import attrgetter

import attrs

from ..booking import Booking
from ..types import Request
from ..view import View
from .amounts import AMOUNT, COUNT_LIMIT, a_callable, weights
from .interface import Listener
from .ledger import Ledger

_STEPS_A_DOUBLING = 8
_LOOKS = 16
"""Accounts that an arrival looks at when there are too many."""


@attrs.define(eq=False)
class Waits:
    """Durations in buckets of equal ratio, 2**(1/8), so a quantile is 5 % right.

    Holds at most a few hundred counts whatever it is told.

    >>> waits = Waits()
    >>> for seconds in range(1, 101):
    ...     waits.add(float(seconds))
    >>> 47 < waits.quantile(0.5) < 53
    True
    """

    count: int = 0
    total_s: float = 0.0
    _buckets: dict[int, int] = attrs.field(factory=dict, init=False)

    def add(self, seconds: float) -> None:
        """Note one; less than a microsecond counts as that."""
        bucket = round(math.log2(max(seconds, 1e-6)) * _STEPS_A_DOUBLING)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1
        self.count += 1
        self.total_s += seconds

    def quantile(self, part: float) -> float:
        """Return the duration that *part* of all do not exceed; NaN of none."""
        left = part * self.count
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                return float(2.0 ** (bucket / _STEPS_A_DOUBLING))
        return math.nan


@attrs.define(eq=False)
class Account:
    """Figures of one tenant or band.

    Attributes:
        waiting: Requests that wait now.
        running: Requests dispatched and not ended.
        dispatched: Requests sent on so far.
        prompt_tokens: Prompt tokens sent on so far.
        cached_tokens: Those of them that were cached.
        output_tokens: Tokens generated so far.
        waits: From arrival to dispatch.
    """

    waiting: int = 0
    running: int = 0
    dispatched: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    waits: Waits = attrs.field(factory=Waits, repr=False)

    @property
    def served_tokens(self) -> int:
        """Prompt and output tokens together."""
        return self.prompt_tokens + self.output_tokens

    def sent(self, booking: Booking, at: float) -> None:
        """Note a dispatch; what was shed or lost before is served once."""
        self.running += 1
        self.dispatched += 1
        if not booking.again:
            tokens = booking.request.prompt_tokens
            self.prompt_tokens += tokens
            self.cached_tokens += tokens - booking.uncached_tokens
            self.waits.add(at - booking.since)

    @property
    def idle(self) -> bool:
        """Whether nothing of it waits or runs."""
        return not self.waiting and not self.running


def jain(amounts: Iterable[float]) -> float:
    """Return Jain's index of fairness: 1 if all are equal, 1/n if one has all.

    Jain, Chiu and Hawe, "A quantitative measure of fairness", DEC TR-301, 1984.

    >>> jain([1, 1, 1, 1]), jain([1, 0, 0, 0]), jain([])
    (1.0, 0.25, 1.0)
    """
    values = [float(amount) for amount in amounts]
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


@attrs.define(eq=False, kw_only=True)
class Accounts(Listener):
    """An account for each tenant, or whatever *by* tells apart.

    Each hook is O(1) but for the service gap's O(log t).  Beyond *most*
    accounts, each arrival closes idle ones among the oldest into `others`, so
    that they are soon as few again as what is in flight lets them be.

    Attributes:
        by: Whom a request belongs to.
        most: Accounts kept while nothing of them is in flight.
        prompt_weight: Of a prompt token, in the service gap.
        output_weight: Of a generated token, in the service gap.
        weights: What each tenant deserves, relative to 1.0 of others; service is
            divided by it in the gap and in `jain`.
        others: What closed accounts had.

    >>> Accounts().jain()
    1.0
    """

    by: Callable[[Request], Hashable] = attrs.field(
        default=attrgetter("tenant"), validator=a_callable, repr=False
    )
    most: float = attrs.field(default=1000, validator=COUNT_LIMIT)
    prompt_weight: float = attrs.field(default=1.0, validator=AMOUNT)
    output_weight: float = attrs.field(default=2.0, validator=AMOUNT)
    weights: Mapping[Hashable, float] = attrs.field(factory=dict, validator=weights)
    others: Account = attrs.field(factory=Account, init=False)
    # The first of a plain dict is behind the holes of all that left before it.
    _accounts: OrderedDict[Hashable, Account] = attrs.field(
        factory=OrderedDict, init=False
    )
    _ledger: Ledger = attrs.field(factory=Ledger, init=False, repr=False)

    def __getitem__(self, tenant: Hashable) -> Account:
        return self._accounts[tenant]

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._accounts)

    def __len__(self) -> int:
        return len(self._accounts)

    def items(self) -> Iterable[tuple[Hashable, Account]]:
        """Return tenants and their accounts."""
        return self._accounts.items()

    def jain(self, weights: Mapping[Hashable, float] | None = None) -> float:
        """Return Jain's index over served tokens, each over its weight."""
        weights = self.weights if weights is None else weights
        return jain(
            account.served_tokens / weights.get(tenant, 1.0)
            for tenant, account in self._accounts.items()
        )

    @property
    def service_gap(self) -> float:
        """Most less least service of tenants that wait, since they wait together."""
        return self._ledger.spread()

    def queued(self, request: Request, view: View) -> None:
        tenant = self.by(request)
        self._account(tenant).waiting += 1
        self._ledger.open(tenant)
        self._close_idle()

    def unqueued(self, request: Request, view: View) -> None:
        tenant = self.by(request)
        account = self._account(tenant)
        # Put in while requests waited, it hears ends without beginnings.
        account.waiting = max(account.waiting - 1, 0)
        self._ledger.close(tenant)

    def dispatched(self, booking: Booking, view: View) -> None:
        tenant = self.by(booking.request)
        self._account(tenant).sent(booking, view.now)
        if not booking.again:
            tokens = booking.request.prompt_tokens
            self._charge(tenant, self.prompt_weight * tokens)

    def generated(self, booking: Booking, tokens: int, view: View) -> None:
        tenant = self.by(booking.request)
        self._account(tenant).output_tokens += tokens
        self._charge(tenant, self.output_weight * tokens)

    def ended(self, booking: Booking, view: View) -> None:
        account = self._account(self.by(booking.request))
        account.running = max(account.running - 1, 0)

    def _charge(self, tenant: Hashable, service: float) -> None:
        self._ledger.add(tenant, service / self.weights.get(tenant, 1.0))

    def _account(self, tenant: Hashable) -> Account:
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Account()
        return account

    def _close_idle(self) -> None:
        """Close idle accounts among the oldest few while there are too many."""
        for _ in range(_LOOKS):
            if len(self._accounts) <= self.most:
                return
            tenant, account = next(iter(self._accounts.items()))
            if account.idle:
                del self._accounts[tenant]
                self._add_to_others(account)
            else:
                # Behind all others, so that it is not in the way next time.
                self._accounts.move_to_end(tenant)

    def _add_to_others(self, account: Account) -> None:
        for name in ("dispatched", "prompt_tokens", "cached_tokens", "output_tokens"):
            total = getattr(self.others, name) + getattr(account, name)
            setattr(self.others, name, total)
