"""As many workers as would have been enough for most of what came lately."""

from __future__ import annotations

import math
from collections import deque

import attrs

from ..errors import InvalidPolicy
from ..recommendation import Proposal
from ..view import View
from .amounts import positive
from .interface import Autoscaler
from .window import moment


@attrs.define(kw_only=True)
class Quantile(Autoscaler):
    """Follows a part of what another policy wanted lately, arrivals counted.

    When a new worker takes longer to start than a burst lasts, a wish comes
    too late for the burst that caused it, and what matters is how many workers
    the bursts to come will need: as many as were enough for most requests of
    the bursts before.  Each second's wish weighs as much as arrived in it, so
    that a promise to 95 % of requests may ignore what only 5 % of them saw.

    Attributes:
        policy: Whose wishes count.
        part: Of the arrivals, for whom the count must have been enough.
        window: Seconds to look back.
        step: Seconds whose wishes count as one, the largest.

    >>> from llmd.autoscaler import TargetConcurrency
    >>> inner = TargetConcurrency(requests_per_worker=5)
    >>> Quantile(policy=inner, part=0.95, max_workers=8).window
    600.0
    """

    policy: Autoscaler
    part: float = 0.97
    window: float = attrs.field(default=600.0, validator=positive)
    step: float = attrs.field(default=1.0, validator=positive)
    _seen: deque[tuple[float, float, int]] = attrs.field(factory=deque, init=False)
    _counted: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if not 0 < self.part <= 1:
            raise InvalidPolicy(f"part is {self.part}, must be in (0, 1]")

    def proposals(self, view: View) -> tuple[Proposal, ...]:
        inner = self.policy.proposals(view)
        told = [proposal.workers for proposal in inner if proposal.valid]
        if len(told) < len(inner):
            return inner
        wish = self._quantile(view, max(told))
        names = ", ".join([proposal.name for proposal in inner])
        note = f"enough for {self.part:.3g} of the last {self.window:.4g} s"
        return (Proposal(f"Quantile of {names}", wish, note),)

    def wanted(self, view: View) -> float:
        return self._quantile(view, self.policy.wanted(view))

    def _quantile(self, view: View, wish: float) -> float:
        now = moment(view)
        arrived = view.totals.requests - self._counted
        self._counted = view.totals.requests
        seen = self._seen
        if seen and now - seen[-1][0] < self.step:
            at, before, weight = seen.pop()
            seen.append((at, max(before, wish), weight + arrived))
        else:
            seen.append((now, wish, arrived))
        while seen[0][0] <= now - self.window:
            seen.popleft()
        allowed = math.floor((1 - self.part) * sum([weight for *_, weight in seen]))
        for _, wanted, weight in sorted(seen, key=lambda row: -row[1]):
            allowed -= weight
            if allowed < 0:
                return wanted
        # Nothing arrived: what is still there counts alone.
        return wish
