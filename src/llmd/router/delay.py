"""The router that counts the delay of everybody, not of one request alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np

from ..decision import Term
from ..machines import Machine
from ..native import loops
from ..types import Request, Tier
from ..view import Floats, Ints, View
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
        workers, held = view.workers, view.cached_tokens(request)
        machine = self._rates.of(workers)
        mixed = isinstance(machine.knee, np.ndarray)
        weigh = _in_numpy if mixed or loops is None else _compiled
        rows, slower = weigh(workers.loads, held, request, self._figures(machine))
        queued, own, context, waiting, queued_s, own_s, beside_s, others_s = rows
        terms = (
            Term("queued prefill", queued, "tokens", queued_s),
            Term("own prefill", own, "tokens", own_s),
            Term("decoding beside", context, "tokens", beside_s),
            Term("delay of others", waiting, "waiting", others_s),
        )
        if not slower:
            return terms
        loaded = (held[:, -1] - held[:, Tier.GPU]).astype(np.float64)
        return *terms, Term("load", loaded, "tokens", self._rates.load_s(held, workers))

    def _figures(self, machine: Machine) -> tuple[Any, ...]:
        return (
            machine.prefill_s_per_token,
            machine.prefill_floor_s,
            machine.graph_tokens,
            machine.graph_floor_s,
            machine.knee,
            machine.attention_s_per_token2,
            machine.prefix_s_per_token,
            machine.decode_s_per_request,
            machine.decode_s_per_context_token,
            self.always,
            self.waiting_here,
            self.waiting_anywhere,
            self.answering_here,
            self.step_tokens,
        )


def _compiled(
    loads: Ints, held: Ints, request: Request, figures: tuple[Any, ...]
) -> tuple[Floats, bool]:
    """Do what `_in_numpy` does, in one loop over workers."""
    assert loops is not None
    rows: Floats = np.empty((8, loads.shape[1]))
    held = np.ascontiguousarray(held, dtype=np.int64)
    slower = loops.delays(loads, held, request.prompt_tokens, figures, rows)
    return rows, slower


def _in_numpy(
    loads: Ints, held: Ints, request: Request, figures: tuple[Any, ...]
) -> tuple[Floats, bool]:
    """Weigh *request* at each worker.

    Args:
        loads: As in `Workers`, (4, W).
        held: Tokens in each tier or a faster one, (W, tiers).
        request: Its prompt counts.
        figures: Of machine and router; numbers or (W,), in the order of
            `_figures`.

    Returns:
        (8, W): tokens queued, own tokens, tokens of context, requests waiting;
        then seconds: of what is queued, of its own prompt, that decoding adds
        to the two, that it takes from others.  And whether any worker holds
        more in slower tiers than in the first.
    """
    per_token, eager_s, graph_tokens, graph_s, knee, attention, prefix = figures[:7]
    per_request, per_context = figures[7:9]
    always, here, anywhere, answering, step_tokens = figures[9:]

    def prefill_s(tokens: Floats, context: Floats | float) -> Floats:
        floor = np.where(tokens <= graph_tokens, graph_s, eager_s)
        joined = ((per_token * tokens) ** knee + floor**knee) ** (1 / knee)
        attended = tokens * (context + tokens * 0.5)
        seconds: Floats = joined + attended * attention + context * prefix
        return seconds

    running, waiting, queued, context = loads.astype(np.float64)
    known = held[:, -1].astype(np.float64)
    own = np.maximum(request.prompt_tokens - known, 1.0)
    own_s = prefill_s(own, known)
    # Attention makes one long prompt dearer than two of half its length, so of
    # what is queued the mean prompt is priced, the first being half done.
    mean = np.divide(queued, waiting, out=np.zeros_like(queued), where=waiting > 0.0)
    queued_s = prefill_s(mean, 0.0) * np.maximum(waiting - 0.5, 0.0) * (mean > 0.0)
    # Decoding lengthens a step full of prompt by this part.
    decoding = context * per_context + running * per_request
    beside = decoding / prefill_s(np.full(1, step_tokens, np.float64), 0.0)
    fleet = always + anywhere * (waiting.sum() / max(len(waiting), 1))
    others = fleet + here * waiting + answering * (running - waiting)
    rows = np.stack(
        [
            *(queued, own, context, waiting),
            *(queued_s, own_s, (queued_s + own_s) * beside, own_s * others),
        ]
    )
    return rows, bool((held[:, -1] != held[:, Tier.GPU]).any())
