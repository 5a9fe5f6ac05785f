"""Counts of several kinds of workers: roles, and machines of several prices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import attrs
import numpy as np

from ..errors import InvalidPolicy
from ..recommendation import Recommendation, Step
from ..types import Role, Worker
from ..view import View
from .followers import _positive
from .interface import Autoscaler


@attrs.frozen(kw_only=True)
class Pool:
    """Which workers are of one kind, and how many of them there should be.

    Attributes:
        policy: Chooses their number; it sees them alone.
        role: Theirs exactly; None: any.
        machine: Theirs; empty: any.
    """

    policy: Autoscaler
    role: Role | None = None
    machine: str = ""

    def has(self, worker: Worker) -> bool:
        """Say whether *worker* is one of them."""
        return (self.role is None or worker.role == self.role) and (
            not self.machine or worker.machine == self.machine
        )


@attrs.define(kw_only=True)
class Pools(Autoscaler):
    """Chooses a count for each of several pools, within one budget.

    Too large a sum shrinks all pools in proportion, so that the ratio of
    prefill to decode workers stays what their policies found it should be.

    Attributes:
        pools: By name.
        budget: Workers in all; None: what each may have.

    >>> from llmd.autoscaler import TargetConcurrency
    >>> one = TargetConcurrency(requests_per_worker=8, max_workers=6)
    >>> two = TargetConcurrency(requests_per_worker=64, max_workers=6)
    >>> pools = Pools(pools={"prefill": Pool(policy=one, role=Role.PREFILL),
    ...                      "decode": Pool(policy=two, role=Role.DECODE)}, budget=8)
    >>> sorted(pools.pools)
    ['decode', 'prefill']
    """

    pools: Mapping[str, Pool]
    budget: int | None = None

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        least = sum([pool.policy.min_workers for pool in self.pools.values()])
        if self.budget is not None and least > self.budget:
            raise InvalidPolicy(
                f"pools need {least} workers at least, the budget is {self.budget}"
            )

    def wanted(self, view: View) -> float:
        return float(sum([a.workers for a in self.recommendations(view)]))

    def recommendations(self, view: View) -> Sequence[Recommendation]:
        advised = {}
        for name, pool in self.pools.items():
            members = [pool.has(worker) for worker in view.workers.facts]
            seen = view.only(np.array(members, dtype=np.bool_))
            advised[name] = attrs.evolve(pool.policy.recommend(seen), pool=name)
        return self._within_budget(advised)

    def _within_budget(
        self, advised: dict[str, Recommendation]
    ) -> Sequence[Recommendation]:
        wishes = {name: advice.workers for name, advice in advised.items()}
        if self.budget is None or sum(wishes.values()) <= self.budget:
            return tuple(advised.values())
        least = {name: pool.policy.min_workers for name, pool in self.pools.items()}
        counts = share(self.budget, wishes, least)
        reason = f"{sum(wishes.values())} workers shrunk to a budget of {self.budget}"
        return tuple(
            [
                attrs.evolve(
                    advice,
                    workers=counts[name],
                    steps=(
                        *advice.steps,
                        Step("budget", advice.workers, counts[name], reason),
                    ),
                )
                for name, advice in advised.items()
            ]
        )


def share(
    budget: int, wishes: Mapping[str, int], least: Mapping[str, int]
) -> dict[str, int]:
    """Divide *budget* in proportion to *wishes*, each getting its *least*.

    Largest remainders get what is left over; ties go by name.

    >>> share(8, {"prefill": 4, "decode": 8}, {"prefill": 1, "decode": 1})
    {'prefill': 3, 'decode': 5}
    """
    total = sum(wishes.values())
    exact = {name: budget * wish / total for name, wish in wishes.items()}
    counts = {name: max(int(exact[name]), least[name]) for name in wishes}
    while sum(counts.values()) > budget:
        over = [name for name in wishes if counts[name] > least[name]]
        counts[max(over, key=lambda name: (counts[name] - exact[name], name))] -= 1
    while sum(counts.values()) < budget:
        under = [name for name in wishes if counts[name] < wishes[name]]
        counts[max(under, key=lambda name: (exact[name] - counts[name], name))] += 1
    return counts


@attrs.frozen(kw_only=True)
class Offer:
    """A kind of machine that can be had.

    Attributes:
        machine: Its name, the pool's and its workers'.
        price: Of one for an hour, in any currency.
        worth: Workers of the reference kind that it stands for.
        most: Of them that can be had.
    """

    machine: str
    price: float = attrs.field(validator=_positive)
    worth: float = attrs.field(default=1.0, validator=_positive)
    most: int = 1 << 20


@attrs.define(kw_only=True)
class Cheapest(Autoscaler):
    """Meets a wish with the cheapest machines, within a budget of money.

    The policy counts in reference workers.  Machines that are the cheapest for
    what they are worth are added first, the dearest removed first.

    Attributes:
        policy: Whose recommendation, windows and all, is met.
        offers: What can be had.
        budget: Most money an hour; inf: any.

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

    def wanted(self, view: View) -> float:
        return float(self.policy.recommend(view).workers)

    def recommendations(self, view: View) -> Sequence[Recommendation]:
        advice = self.policy.recommend(view)
        plan = self.plan(float(advice.workers))
        return tuple([self._of(advice, name, count) for name, count in plan.items()])

    def plan(self, workers: float) -> dict[str, int]:
        """Return how many machines of each kind stand for *workers*."""
        short, money, counts = workers, self.budget, {}
        for offer in sorted(self.offers, key=lambda o: (o.price / o.worth, o.machine)):
            need = min(max(math.ceil(short / offer.worth), 0), offer.most)
            if money < math.inf:
                need = min(need, int(money / offer.price))
            counts[offer.machine] = need
            short -= need * offer.worth
            money -= need * offer.price
        return counts

    def _of(self, advice: Recommendation, machine: str, count: int) -> Recommendation:
        reason = f"the cheapest {advice.workers} workers' worth of machines"
        step = Step("price", advice.workers, count, reason)
        return attrs.evolve(
            advice, workers=count, pool=machine, steps=(*advice.steps, step)
        )
