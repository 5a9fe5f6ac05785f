"""Counts of several kinds of workers, within one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import numpy as np

from ..errors import InvalidPolicy, shown
from ..recommendation import Proposal, Recommendation, Step
from ..types import Role, Worker
from ..view import View
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

    The bounds and windows are those of the pools' own policies.  A policy that
    fails keeps its own pool's count, and the advice says so.

    Attributes:
        pools: By name.
        budget: Workers in all; None: what each may have.

    Raises:
        InvalidPolicy: There is no pool, or the budget is no whole number or
            under what the pools need at least.

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
    _counts: dict[str, int] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if not self.pools:
            raise InvalidPolicy("there are no pools")
        if self.budget is not None and type(self.budget) is not int:
            raise InvalidPolicy(f"budget is {shown(self.budget)}, must be workers")
        least = sum([pool.policy.min_workers for pool in self.pools.values()])
        if self.budget is not None and least > self.budget:
            raise InvalidPolicy(
                f"pools need {least} workers at least, the budget is {self.budget}"
            )

    def wanted(self, view: View) -> float:
        return float(self.recommend(view).workers)

    def recommend(self, view: View) -> Recommendation:
        parts = self._within_budget(self._advised(view))
        self._counts = {part.pool: part.workers for part in parts}
        self.advice = Recommendation.together(view.now, parts)
        return self.advice

    def recommendations(self, view: View) -> Sequence[Recommendation]:
        return self.recommend(view).parts

    def _advised(self, view: View) -> dict[str, Recommendation]:
        """Return what each pool's policy says of its own workers."""
        advised = {}
        for name, pool in self.pools.items():
            members = [pool.has(worker) for worker in view.workers.facts]
            part = view.only(np.array(members, dtype=np.bool_))
            try:
                advice = pool.policy.recommend(part)
            except Exception as error:  # the other pools' counts are still told
                advice = self._held(name, pool, part, error)
            # What a policy asked for before, the budget may have cut.
            current = self._counts.get(name, advice.current)
            advised[name] = attrs.evolve(advice, pool=name, current=current)
        return advised

    def _held(
        self, name: str, pool: Pool, part: View, error: Exception
    ) -> Recommendation:
        """Return a pool's count as it is, which bounds and waiting agree with."""
        count = self._counts.get(name, int(part.workers.supply().sum()))
        untold = Proposal.untold(type(pool.policy).__name__, error)
        return Recommendation(
            at=part.now, current=count, workers=count, proposals=(untold,)
        )

    def _within_budget(
        self, advised: dict[str, Recommendation]
    ) -> Sequence[Recommendation]:
        wishes = {name: advice.workers for name, advice in advised.items()}
        if self.budget is None or sum(wishes.values()) <= self.budget:
            return tuple(advised.values())
        least = {name: pool.policy.min_workers for name, pool in self.pools.items()}
        # What wakes a pool, or keeps it awake, must not be rounded off.
        awake = {name: max(least[name], min(wishes[name], 1)) for name in wishes}
        least = awake if sum(awake.values()) <= self.budget else least
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
