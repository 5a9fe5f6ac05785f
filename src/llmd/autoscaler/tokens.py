"""Supply and demand in KV tokens, with a gap between growing and shrinking."""

from __future__ import annotations

import math

import attrs

from ..errors import InvalidPolicy
from ..recommendation import Proposal
from ..view import View
from .interface import Autoscaler


@attrs.define(kw_only=True)
class TokenSupply(Autoscaler):
    """Grows when demand outruns supply, shrinks when supply clearly outruns it.

    Rules: llm-d-workload-variant-autoscaler, saturation analysis: more are
    needed for `demand / grow_at - supply` tokens, where supply counts workers
    that are still starting; `supply - demand / shrink_at` may go.

    Attributes:
        grow_at: Part of the supply in use above which it grows.
        shrink_at: Part under which it shrinks; lower, so that it never flaps.
        tokens_per_worker: What one worker holds; None: what workers say.

    >>> TokenSupply(max_workers=4).shrink_at
    0.7
    """

    grow_at: float = 0.85
    shrink_at: float = 0.70
    tokens_per_worker: float | None = None

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if not 0 < self.shrink_at < self.grow_at:
            raise InvalidPolicy("must be 0 < shrink_at < grow_at")

    def proposals(self, view: View) -> tuple[Proposal, ...]:
        demand, each, there = self._measure(view)
        wish = self._checked(self.wanted(view))
        note = f"{demand} tokens wanted, {there} workers of {each:.0f} there or coming"
        return (Proposal("TokenSupply", wish, note),)

    def wanted(self, view: View) -> float:
        demand, each, there = self._measure(view)
        if not there:
            return float(demand > 0)
        short = demand / self.grow_at - there * each
        spare = there * each - demand / self.shrink_at
        if short > 0:
            return there + short / each
        return there - max(math.floor(spare / each), 0)

    def _measure(self, view: View) -> tuple[int, float, int]:
        workers, supply = view.workers, view.workers.supply()
        demand = int(workers.context_tokens.sum()) + view.waiting.prompt_tokens
        each = self.tokens_per_worker
        if each is None:
            held = workers.kv_tokens[supply]
            each = float(held.mean()) if len(held) else math.nan
        return demand, each, int(supply.sum())
