"""Routers that price in seconds, by the machine's own rates."""

from __future__ import annotations

import attrs
import numpy as np

from ..decision import Term
from ..machines import Machine
from ..types import Request, Tier
from ..view import Floats, View
from .interface import TermRouter


@attrs.define
class EarliestFirstToken(TermRouter):
    """Sends each request where its first token is expected soonest.

    Expected time = prompts queued there + its own uncached prompt + loads of
    blocks from slower tiers + the pull of what already runs there.

    Attributes:
        machine: Rates of workers that name no machine of `llmd.machines`.
        decode_weight: Seconds of delay charged for each second by which one
            more request slows a decode step for all who run there; 0 looks
            at the first token only.

    >>> EarliestFirstToken().decode_weight
    1.0
    """

    machine: Machine = attrs.field(factory=Machine)
    decode_weight: float = 1.0

    def terms(self, request: Request, view: View) -> tuple[Term, ...]:
        workers, machine = view.workers, self.machine
        held = view.cached_tokens(request)
        cached_tokens = held[:, -1].astype(np.float64)
        own_tokens: Floats = np.maximum(request.prompt_tokens - cached_tokens, 1.0)
        queued_tokens = workers.prefill_tokens.astype(np.float64)
        terms = [
            Term(
                "queued prefill",
                queued_tokens,
                "tokens",
                queued_tokens * machine.prefill_s_per_token,
            ),
            Term(
                "own prefill",
                own_tokens,
                "tokens",
                machine.prefill_s(own_tokens, cached_tokens),
            ),
        ]
        if held[:, -1].any() and (held[:, -1] != held[:, Tier.GPU]).any():
            loaded = held[:, -1] - held[:, Tier.GPU]
            terms.append(Term("load", loaded, "tokens", self._load_s(held)))
        if self.decode_weight:
            running = workers.running_requests.astype(np.float64)
            terms.append(
                Term(
                    "running",
                    running,
                    "requests",
                    running * machine.decode_s_per_request,
                    self.decode_weight,
                )
            )
        return tuple(terms)

    def _load_s(self, held: np.typing.NDArray[np.int64]) -> Floats:
        """Seconds to load what lies in slower tiers, shape (W,)."""
        seconds: Floats = np.zeros(len(held), dtype=np.float64)
        for tier in list(Tier)[1:]:
            tokens = held[:, tier] - held[:, tier - 1]
            seconds += tokens * self.machine.load_s_per_token(tier)
        return seconds
