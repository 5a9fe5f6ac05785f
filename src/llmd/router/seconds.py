"""Routers that price in seconds, by the machine's own rates."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import numpy as np

from ..decision import Term
from ..machines import Machine
from ..types import Request, Tier
from ..view import Floats, View
from .interface import TermRouter
from .rates import Rates


@attrs.define
class EarliestFirstToken(TermRouter):
    """Sends each request where its first token is expected soonest.

    Expected time = prompts queued there + its own uncached prompt + loads of
    blocks from slower tiers + the pull of what already runs there.

    Attributes:
        machine: Rates of workers that name no machine of *machines*.
        machines: Rates by the name in `Worker.machine`, for a mixed fleet.
        decode_weight: Seconds of delay charged for each second by which one
            more request slows a decode step for all who run there; 0 looks
            at the first token only.
        work_weight: Part of its own products' seconds charged once more, for
            those behind it: it prefers a worker that holds the prefix where
            the first token would come no sooner, as a step has a floor.

    >>> EarliestFirstToken().decode_weight
    1.0
    """

    machine: Machine = attrs.field(factory=Machine)
    decode_weight: float = 1.0
    work_weight: float = attrs.field(default=0.1, kw_only=True)
    machines: Mapping[str, Machine] = attrs.field(factory=dict, kw_only=True)
    _rates: Rates = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        self._rates = Rates(self.machine, dict(self.machines))

    def terms(self, request: Request, view: View) -> tuple[Term, ...]:
        workers = view.workers
        machine = self._rates.of(workers)
        held = view.cached_tokens(request)
        cached = held[:, -1].astype(np.float64)
        own: Floats = np.maximum(request.prompt_tokens - cached, 1.0)
        queued = workers.prefill_tokens.astype(np.float64)
        terms = [
            Term(
                "queued prefill", queued, "tokens", queued * machine.prefill_s_per_token
            ),
            Term("own prefill", own, "tokens", machine.prefill_s(own, cached)),
        ]
        if self.work_weight:
            work = own * machine.prefill_s_per_token
            terms.append(Term("work", own, "tokens", work, self.work_weight))
        # One column shown four times, as an index without slower tiers gives.
        if held.strides[1] and (held[:, -1] != held[:, Tier.GPU]).any():
            loaded = cached - held[:, Tier.GPU]
            terms.append(
                Term("load", loaded, "tokens", self._rates.load_s(held, workers))
            )
        if self.decode_weight:
            running = workers.running_requests.astype(np.float64)
            slowed = running * machine.decode_s_per_request
            terms.append(
                Term("running", running, "requests", slowed, self.decode_weight)
            )
        return tuple(terms)
