"""The cheapest machines that a wish can be met with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import attrs

from ..errors import InvalidPolicy, shown
from ..recommendation import Recommendation, Step
from ..view import View
from .amounts import is_number, is_whole, positive
from .interface import Autoscaler

# Prices and worths in decimals do not divide exactly: 0.3 / 0.1 < 3.
_SLACK = 1e-9


def _finite(instance: object, attribute: Any, value: float) -> None:
    positive(instance, attribute, value)
    if not value < math.inf:
        raise InvalidPolicy(f"Offer.{attribute.name} is {value}, must be finite")


def _whole(instance: object, attribute: Any, value: int) -> None:
    if not (is_whole(value) and value > 0):
        where = f"Offer.{attribute.name}"
        raise InvalidPolicy(f"{where} is {shown(value)}, must be a whole number over 0")


@attrs.frozen(kw_only=True)
class Offer:
    """A kind of machine that can be had.

    Attributes:
        machine: Its name, the pool's and its workers'.
        price: Of one for an hour, in any currency.
        worth: Workers of the reference kind that it stands for.
        most: Of them that can be had.

    Raises:
        InvalidPolicy: It has no name, or a value is not over 0.

    >>> Offer(machine="h200", price=3.5).worth
    1.0
    """

    machine: str
    price: float = attrs.field(validator=_finite)
    worth: float = attrs.field(default=1.0, validator=_finite)
    most: int = attrs.field(default=1 << 20, validator=_whole)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.machine, str) or not self.machine:
            raise InvalidPolicy(f"Offer.machine is {shown(self.machine)}, not a name")


@attrs.frozen
class _Lot:
    """So many machines of one kind, and why no more."""

    offer: Offer
    count: int
    reason: str


@attrs.define(kw_only=True)
class Cheapest(Autoscaler):
    """Meets a wish with the cheapest machines, within a budget of money.

    The policy counts in reference workers.  Machines that are the cheapest for
    what they are worth are added first, the dearest removed first.

    That is greedy, and off the best choice by less than one machine: a wish
    that is met costs at most the price of the dearest one more than it must,
    and one that the money cannot meet is missed by at most the worth of the
    largest one more.  Where few machines make up the fleet, that may be
    much: a wish of 1 is met by a machine worth 8, if that is the cheapest by
    its worth.

    Attributes:
        policy: Whose recommendation, windows and all, is met.
        offers: What can be had, each machine once.
        budget: Most money an hour; inf: any.

    Raises:
        InvalidPolicy: There is no offer, or two of one machine, or the budget
            is negative or no number.

    >>> from llmd.autoscaler import TargetConcurrency
    >>> load = TargetConcurrency(requests_per_worker=8, max_workers=6)
    >>> old = Offer(machine="a100", price=2.0, worth=0.5, most=4)
    >>> new = Offer(machine="h200", price=3.5)
    >>> Cheapest(policy=load, offers=(old, new)).plan(2.5)
    {'h200': 3, 'a100': 0}
    """

    policy: Autoscaler
    offers: tuple[Offer, ...]
    budget: float = math.inf
    _parts: tuple[Recommendation, ...] = attrs.field(default=(), init=False)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        _check(self.offers)
        money = self.budget
        if not (is_number(money) and money >= 0):
            said = f"budget is {shown(money)}, must be a number, and not negative"
            raise InvalidPolicy(said)

    def wanted(self, view: View) -> float:
        return float(self.policy.recommend(view).workers)

    def recommend(self, view: View) -> Recommendation:
        wish = self.policy.recommend(view)
        lots = self._lots(float(wish.workers))
        self._parts = parts = tuple([self._part(view, wish, lot) for lot in lots])
        # The wish, which all of them share, is told of once.
        brief = [attrs.evolve(p, proposals=(), steps=p.steps[-1:]) for p in parts]
        self.advice = attrs.evolve(
            Recommendation.together(view.now, brief),
            proposals=wish.proposals,
            steps=(*wish.steps, *_missed(wish.workers, lots)),
        )
        return self.advice

    def recommendations(self, view: View) -> Sequence[Recommendation]:
        self.recommend(view)
        return self._parts

    def plan(self, workers: float) -> dict[str, int]:
        """Return how many machines of each kind stand for *workers*."""
        return {lot.offer.machine: lot.count for lot in self._lots(workers)}

    def _lots(self, workers: float) -> list[_Lot]:
        short, money, lots = workers, self.budget, list[_Lot]()
        for offer in sorted(self.offers, key=lambda o: (o.price / o.worth, o.machine)):
            lots.append(_lot(offer, short, money))
            short -= lots[-1].count * offer.worth
            money -= lots[-1].count * offer.price
        return lots

    def _part(self, view: View, wish: Recommendation, lot: _Lot) -> Recommendation:
        machine = lot.offer.machine
        step = Step("price", wish.workers, lot.count, lot.reason)
        return attrs.evolve(
            wish,
            current=self._count(view, machine),
            workers=lot.count,
            pool=machine,
            steps=(*wish.steps, step),
        )

    def _count(self, view: View, machine: str) -> int:
        """Return how many were asked for; at first, how many are there."""
        for part in self._parts:
            if part.pool == machine:
                return part.workers
        there = zip(view.workers.facts, view.workers.supply(), strict=True)
        return sum([worker.machine == machine and bool(live) for worker, live in there])


def _check(offers: Sequence[Offer]) -> None:
    if not offers:
        raise InvalidPolicy("there are no offers to choose the cheapest from")
    for offer in offers:
        if not isinstance(offer, Offer):
            raise InvalidPolicy(f"{shown(offer)} is no Offer")
    machines = [offer.machine for offer in offers]
    if twice := sorted({name for name in machines if machines.count(name) > 1}):
        raise InvalidPolicy(f"offered twice: {', '.join(twice)}")


def _lot(offer: Offer, short: float, money: float) -> _Lot:
    """Return how many of *offer* to take while *short* workers are missing."""
    need = max(math.ceil(short / offer.worth - _SLACK), 0)
    bounds = [
        (need, f"enough for {short:g} workers" if need else "no more are needed"),
        (offer.most, f"no more than {offer.most} can be had"),
    ]
    if money < math.inf:
        left = f"{money:g} an hour, at {offer.price:g} each, buys no more"
        bounds.append((math.floor(money / offer.price + _SLACK), left))
    count, reason = min(bounds, key=itemgetter(0))
    return _Lot(offer, count, reason)


def _missed(workers: int, lots: Sequence[_Lot]) -> tuple[Step, ...]:
    """Return what says that the wish cannot be met, if so."""
    worth = sum([lot.count * lot.offer.worth for lot in lots])
    if worth > workers - _SLACK:
        return ()
    reason = f"all that can be had and paid is worth {worth:g} workers"
    return (Step("offers", workers, math.floor(worth + _SLACK), reason),)
