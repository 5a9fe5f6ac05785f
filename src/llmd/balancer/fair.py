"""Fairness among tenants: who has had least goes next.

All count in `Ledger`s, one for each policy object.  Tenants are compared over
everything they had through that object, whatever the model; the bounds hold
between tenants whose requests the same workers can serve.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Collection, Hashable, Mapping
from operator import attrgetter
from typing import Any

import attrs

from ..amounts import a_number, kind
from ..booking import Booking
from ..errors import PolicyError
from ..types import Request
from ..view import View
from .amounts import AMOUNT, POSITIVE, a_callable, weights
from .bands import Bands
from .interface import Place, QueueBalancer
from .ledger import Ledger
from .orders import Fcfs
from .over import Over

_NOTHING: dict[tuple[str, str], list[int]] = {}
_LEVELS = 1024
"""Models, and groups of each, whose level is remembered."""

_tenant: Callable[[Request], Hashable] = attrgetter("tenant")


@attrs.define(eq=False)
class Backlogs:
    """What waits of each tenant: for which models and adapters, and how many tokens."""

    _tenants: dict[Hashable, dict[tuple[str, str], list[int]]] = attrs.field(
        factory=dict
    )
    _of_model: dict[str, int] = attrs.field(factory=dict)

    def of(self, tenant: Hashable) -> Collection[tuple[str, str]]:
        """Return the models and adapters that a tenant waits for."""
        return self._tenants.get(tenant, _NOTHING)

    def tokens(self, tenant: Hashable, models: Collection[str] | None) -> int:
        """Sum of a tenant's waiting prompts for any of *models*; None for all."""
        waiting = self._tenants.get(tenant, {}).items()
        return sum(
            tokens
            for (model, _), (_, tokens) in waiting
            if models is None or model in models
        )

    def tenants(self, models: Collection[str] | None) -> int:
        """Count the tenants that wait for any of *models*, at most; None for all."""
        if models is None:
            return len(self._tenants)
        waiting = self._of_model
        return sum(waiting[model] for model in models if model in waiting)

    def count(self, tenant: Hashable, request: Request, by: int) -> None:
        """Count a request that begins (1) or ceases (-1) to wait."""
        tokens, kind = by * request.prompt_tokens, (request.model, request.lora)
        kinds = self._tenants.get(tenant)
        counts = None if kinds is None else kinds.get(kind)
        if counts is not None and counts[0] + by > 0:
            counts[0] += by
            counts[1] += tokens
            return
        if counts is None and by < 0:
            return  # of one whose beginning was not heard
        left = self._of_model.get(request.model, 0) + by
        if left > 0:
            self._of_model[request.model] = left
        else:
            self._of_model.pop(request.model, None)
        if kinds is None:
            self._tenants[tenant] = {kind: [by, tokens]}
        elif counts is None:
            kinds[kind] = [by, tokens]
        elif len(kinds) > 1:
            del kinds[kind]
        else:
            del self._tenants[tenant]


def _no_bands(instance: object, field: Any, value: QueueBalancer) -> None:
    while isinstance(value, Over):
        value = value.order
    if isinstance(value, Bands):
        name = type(instance).__name__
        raise PolicyError(
            f"{name}({type(value).__name__}): fair orders go inside bands"
        )


@attrs.define(eq=False, kw_only=True)
class Fair(Over, abc.ABC):
    """One flow for each tenant, each in the order of `order`.

    Attributes:
        order: Of the requests of one tenant; its own flows are not looked at.
        weights: What part each tenant deserves, relative to 1.0 of others.
        tenant: Whom a request belongs to.
    """

    order: QueueBalancer = attrs.field(
        factory=Fcfs, kw_only=False, validator=[kind(QueueBalancer), _no_bands]
    )
    weights: Mapping[Hashable, float] = attrs.field(factory=dict, validator=weights)
    tenant: Callable[[Request], Hashable] = attrs.field(
        default=_tenant, validator=a_callable, repr=False
    )
    ledger: Ledger = attrs.field(factory=Ledger, init=False, repr=False)
    _level: dict[str, dict[Hashable, float]] = attrs.field(
        factory=dict, init=False, repr=False
    )
    _backlog: Backlogs = attrs.field(factory=Backlogs, init=False, repr=False)

    def flow(self, request: Request) -> Hashable:
        return self.tenant(request)

    def weight(self, tenant: Hashable) -> float:
        """Return the weight of a tenant."""
        return self.weights.get(tenant, 1.0)

    def turn(self, flow: Hashable, view: View) -> Any:
        # Whom a return lifted level with a flood goes before it.
        ledger = self.ledger
        return ledger[flow], not ledger.fresh(flow), ledger.number(flow)

    def place(self, request: Request, view: View, since: float) -> Place:
        below = self.order.place(request, view, since)
        return Place(below.key, self.flow(request), below.lane, below.until)

    def queued(self, request: Request, view: View) -> None:
        self.order.queued(request, view)
        tenant = self.tenant(request)
        kinds = self._backlog.of(tenant)
        if (request.model, request.lora) in kinds:
            self.ledger.open(tenant)
        else:
            # Who waits for workers that are not there must not hold the level
            # down, nor save anything up meanwhile.
            level = self._level_of(request, view)
            if not self.ledger.open(tenant, level) and not any(
                view.workers.serve(model, lora) for model, lora in kinds
            ):
                self.ledger.lift(tenant, level)
        self._backlog.count(tenant, request, 1)

    def _level_of(self, request: Request, view: View) -> float:
        """Return what the last to be served of the same workers had had."""
        levels = self._level.get(request.model)
        if not levels:
            return 0.0
        group = view.waiting.group_of(request)
        return levels[group] if group in levels else min(levels.values())

    def unqueued(self, request: Request, view: View) -> None:
        tenant = self.tenant(request)
        self.ledger.close(tenant)
        self._backlog.count(tenant, request, -1)
        self.order.unqueued(request, view)

    def tokens_ahead(self, request: Request, view: View) -> int:
        # Its tenant's own go first, and meanwhile as much of each other's; before
        # the first of its own, what others had less than it.
        tenant = self.tenant(request)
        models = view.workers.models_beside(request.model)
        own, others = (
            self._backlog.tokens(tenant, models),
            self._backlog.tenants(models),
        )
        if own:
            ahead = own * others + request.prompt_tokens * (others - 1)
        else:
            ahead = int(max(self.ledger[tenant] - self.ledger.floor, 0.0) * others)
        return min(self.order.tokens_ahead(request, view), ahead)

    @abc.abstractmethod
    def charge(self, request: Request, tokens: float, view: View) -> None:
        """Charge the tenant of *request* for *tokens* of service."""

    @abc.abstractmethod
    def prompt_cost(self, booking: Booking) -> float:
        """Return what the prompt of a request costs on dispatch."""

    def token_cost(self, tokens: int) -> float:
        """Return what *tokens* of output cost."""
        return float(tokens)

    def dispatched(self, booking: Booking, view: View) -> None:
        self.order.dispatched(booking, view)
        request = booking.request
        if len(self._level) >= _LEVELS:
            self._level.clear()
        levels = self._level.setdefault(request.model, {})
        if len(levels) >= _LEVELS:
            levels.clear()
        group = view.waiting.group_of(request)
        levels[group] = self.ledger[self.tenant(request)]
        if not booking.again:  # what was shed or lost is paid for once
            self.charge(request, self.prompt_cost(booking), view)

    def generated(self, booking: Booking, tokens: int, view: View) -> None:
        self.charge(booking.request, self.token_cost(tokens), view)
        self.order.generated(booking, tokens, view)


@attrs.define(eq=False, kw_only=True)
class Vtc(Fair):
    """Virtual token counter: the tenant with the least service goes next.

    Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024.  A
    tenant that begins to wait is lifted to the least counter of those who
    wait, so that idling earns nothing.  The service of two tenants that wait
    throughout an interval differs by at most 2 * max(prompt_weight * longest
    prompt, output_weight * tokens that all running requests hold at once),
    over the smaller weight.

    Attributes:
        prompt_weight: Cost of a prompt token.
        output_weight: Cost of a generated token.

    >>> Vtc(weights={"gold": 2.0}).weight("gold")
    2.0
    """

    prompt_weight: float = attrs.field(default=1.0, validator=AMOUNT)
    output_weight: float = attrs.field(default=2.0, validator=AMOUNT)

    def charge(self, request: Request, tokens: float, view: View) -> None:
        tenant = self.tenant(request)
        self.ledger.add(tenant, tokens / self.weight(tenant))

    def prompt_cost(self, booking: Booking) -> float:
        return self.prompt_weight * booking.request.prompt_tokens

    def token_cost(self, tokens: int) -> float:
        return self.output_weight * tokens


@attrs.define(eq=False, kw_only=True)
class FairRoundRobin(Vtc):
    """Each tenant in turn, a request at a time, whatever its size.

    The requests dispatched of two tenants that wait throughout an interval
    differ by at most two at equal weights.

    >>> FairRoundRobin().token_cost(5)
    0.0
    """

    def prompt_cost(self, booking: Booking) -> float:
        return 1.0

    def token_cost(self, tokens: int) -> float:
        return 0.0


@attrs.define(eq=False, kw_only=True)
class Drr(Vtc):
    """Deficit round robin: each tenant in turn, *quantum* tokens at a time.

    Shreedhar and Varghese, "Efficient fair queuing using deficit round
    robin", IEEE/ACM ToN 4(3), 1996, in the form that charges afterwards (a
    tenant goes on while its deficit is positive, and pays back what it
    overdrew).  A round in which nobody can send is skipped: what a tenant
    has had, counted in quanta, is the round it is in.  Prompts cost what is
    not cached.

    The service of two tenants that wait throughout an interval differs by at
    most 2 * (quantum + prompt_weight * longest prompt + output_weight * tokens
    that all running requests hold at once).

    Attributes:
        quantum: Tokens a round, at weight 1.0.

    >>> Drr(quantum=512.0).quantum
    512.0
    """

    quantum: float = attrs.field(default=2048.0, validator=POSITIVE)

    def turn(self, flow: Hashable, view: View) -> Any:
        round = self.ledger[flow] // self.quantum
        return round, self.ledger.number(flow)

    def prompt_cost(self, booking: Booking) -> float:
        return self.prompt_weight * booking.uncached_tokens


@attrs.define(eq=False, kw_only=True)
class Las(Vtc):
    """Least attained service, which is forgotten with a half-life.

    A tenant new to the system goes first, and old sins are forgiven.  Nuyens
    and Wierman, "The Foreground-Background queue: a survey", Performance
    Evaluation 65, 2008.  Two tenants that wait throughout differ in attained
    service, decayed, by at most what the requests of one that run at once add;
    no bound holds against a stream of ever new tenants, which is why bands age.

    Counters are kept as log2(service) + time / half-life, in which decay
    changes no order, so that nothing needs to be updated as time passes.

    Attributes:
        half_life: Seconds in which attained service counts half.

    >>> Las(half_life=30.0).half_life
    30.0
    """

    half_life: float = attrs.field(default=60.0, validator=a_number(1e-3))
    ledger: Ledger = attrs.field(
        factory=lambda: Ledger(lifts=False), init=False, repr=False
    )

    def queued(self, request: Request, view: View) -> None:
        past = view.now / self.half_life
        # Less than one token attained is as good as nothing.
        self.order.queued(request, view)
        tenant = self.tenant(request)
        self.ledger.forget_below(past)
        self.ledger.open(tenant, past)
        self._backlog.count(tenant, request, 1)

    def charge(self, request: Request, tokens: float, view: View) -> None:
        if tokens <= 0:
            return
        tenant, past = self.tenant(request), view.now / self.half_life
        attained = 0.0
        if tenant in self.ledger:
            attained = 2.0 ** min(self.ledger[tenant] - past, 1000.0)
        attained += tokens / self.weight(tenant)
        self.ledger.set(tenant, math.log2(attained) + past)
