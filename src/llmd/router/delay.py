"""The router that counts the delay of everybody, not of one request alone."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import numpy as np

from ..decision import Term
from ..machines import Machine
from ..types import Request, Tier
from ..view import Floats, View, Workers
from .interface import TermRouter
from .rates import Rates


@attrs.define
class LeastDelay(TermRouter):
    """Sends each request where it delays itself and those behind it least.

    The seconds to its own first token are what `EarliestFirstToken` counts:
    prompts queued there, its own uncached prompt, loads from slower tiers.  To
    them come the seconds that its prompt takes from all who arrive while the
    worker stays busy, (own seconds) x (how many those are).  In a queue their
    number grows with its backlog and, by 1 / (1 - load), with the load of the
    whole fleet (Kleinrock, "Queueing Systems" vol. 1, 1975, on busy periods);
    requests that wait here, and on the mean worker, stand for the two.  Those
    that are being answered there get their tokens later as well, though each
    by less than the whole prompt.

    So an idle fleet is asked for the earliest first token, as it should be;
    under load uncached work weighs more, a prompt goes where its prefix is
    held though it waits longer there, and hits rise when they are needed most.
    And as long prompts shun queues that short ones still join, short ones
    wait less.  `benchmarks/sim.py` measures it against other routers below,
    at and above saturation, and finds the default weights.

    Attributes:
        machine: Rates of workers that name no machine of *machines*.
        machines: Rates by the name in `Worker.machine`, for a mixed fleet.
        always: Others delayed by a prompt on an idle fleet.
        waiting_here: Others delayed for each request that waits there.
        waiting_anywhere: Others delayed for each that waits on the mean worker.
        answering_here: Others delayed for each that is being answered there.
        step_tokens: Prompt tokens of an engine's step, beside which its running
            requests read their contexts.

    >>> LeastDelay().waiting_here
    3.0
    """

    machine: Machine = attrs.field(factory=Machine)
    machines: Mapping[str, Machine] = attrs.field(factory=dict, kw_only=True)
    always: float = attrs.field(default=1.0, kw_only=True)
    waiting_here: float = attrs.field(default=3.0, kw_only=True)
    waiting_anywhere: float = attrs.field(default=8.0, kw_only=True)
    answering_here: float = attrs.field(default=0.2, kw_only=True)
    step_tokens: int = attrs.field(default=2048, kw_only=True)
    _rates: Rates = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        self._rates = Rates(self.machine, dict(self.machines))

    def terms(self, request: Request, view: View) -> tuple[Term, ...]:
        workers = view.workers
        machine = self._rates.of(workers)
        held = view.cached_tokens(request)
        waiting = workers.waiting_requests.astype(np.float64)
        queued = workers.prefill_tokens.astype(np.float64)
        # Attention makes one long prompt dearer than two of half its length, so
        # of what is queued the mean prompt is priced, beside this prompt: one
        # call for both, as arrays of a fleet's size cost by the call.
        tokens, cached = np.zeros((2, 2, len(workers)))
        cached[0] = held[:, -1]
        np.subtract(request.prompt_tokens, cached[0], out=tokens[0])
        np.maximum(tokens[0], 1.0, out=tokens[0])
        np.divide(queued, waiting, out=tokens[1], where=waiting > 0.0)
        own = tokens[0]
        own_s, mean_s = machine.prefill_s(tokens, cached)
        # The first of them is half done on average.
        queued_s = mean_s * np.maximum(waiting - 0.5, 0.0) * (queued > 0.0)
        context = workers.context_tokens.astype(np.float64)
        terms = [
            Term("queued prefill", queued, "tokens", queued_s),
            Term("own prefill", own, "tokens", own_s),
            Term(
                "decoding beside",
                context,
                "tokens",
                (queued_s + own_s) * self._beside(machine, workers, context),
            ),
            Term(
                "delay of others",
                waiting,
                "waiting",
                own_s * self._others(workers, waiting),
            ),
        ]
        # One column shown four times, as an index without slower tiers gives.
        if held.strides[1] and (held[:, -1] != held[:, Tier.GPU]).any():
            loaded = cached[0] - held[:, Tier.GPU]
            terms.append(
                Term("load", loaded, "tokens", self._rates.load_s(held, workers))
            )
        return tuple(terms)

    def _others(self, workers: Workers, waiting: Floats) -> Floats:
        """Return how many others a prompt delays at each worker, (W,)."""
        anywhere = float(waiting.sum()) / max(len(waiting), 1)
        others: Floats = waiting * (self.waiting_here - self.answering_here)
        others += workers.running_requests * self.answering_here
        others += self.always + self.waiting_anywhere * anywhere
        return others

    def _beside(self, machine: Machine, workers: Workers, context: Floats) -> Floats:
        """Return by which part decoding lengthens a step full of prompt, (W,)."""
        decoding = context * machine.decode_s_per_context_token
        decoding += workers.running_requests * machine.decode_s_per_request
        part: Floats = decoding / machine.prefill_s(float(self.step_tokens))
        return part
