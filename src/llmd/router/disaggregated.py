"""Prefill on one worker, decode on another, where that pays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import attrs
import numpy as np

from ..decision import Decision, Term
from ..errors import PolicyError
from ..machines import Machine
from ..types import Request, Role, Tier, WorkerId
from ..view import Floats, View
from .interface import Router, TermRouter
from .seconds import EarliestFirstToken

LinkSeconds: TypeAlias = Callable[[Sequence[WorkerId], WorkerId, float], Floats]
"""Seconds to move bytes from each of W workers to one, (W,); infinite for no way."""


@attrs.frozen
class UniformLink:
    """The same link between any two workers.

    The default is what the staged push was measured at between two processes
    of one H200: 200 GB/s, and about 1 ms of protocol.

    >>> UniformLink(bytes_per_s=1e9, latency_s=0.5)(["a", "b"], "c", 1e9).tolist()
    [1.5, 1.5]
    """

    bytes_per_s: float = 200e9
    latency_s: float = 1e-3

    def __call__(
        self, sources: Sequence[WorkerId], target: WorkerId, moved_bytes: float
    ) -> Floats:
        seconds = self.latency_s + moved_bytes / self.bytes_per_s
        return np.full(len(sources), seconds, dtype=np.float64)


@attrs.define
class _Paired(TermRouter):
    """A router for prefill that knows where the KV must go afterwards."""

    inner: Router
    transfer_s: Floats

    def terms(self, request: Request, view: View) -> tuple[Term, ...]:
        costs, terms = self.inner.price(request, view)
        if not terms:
            costs = np.asarray(costs, dtype=np.float64)
            terms = (Term(type(self.inner).__name__, costs, "", costs),)
        return (*terms, Term("transfer", self.transfer_s, "s", self.transfer_s))


@attrs.frozen(eq=False)
class _Seconds:
    """What a way of computing a prompt costs everybody, in seconds.

    Attributes:
        queue: Prompts ahead of it.
        compute: Its own.
        transfer: Of its KV to where it is decoded.
        delay: Of those who decode on the worker meanwhile, added up.
    """

    queue: float
    compute: float
    transfer: float = 0.0
    delay: float = 0.0

    @property
    def total(self) -> float:
        return self.queue + self.compute + self.transfer + self.delay

    def __str__(self) -> str:
        parts = [f"{self.queue:.3g} queue", f"{self.compute:.3g} prefill"]
        if self.transfer:
            parts.append(f"{self.transfer:.3g} transfer")
        if self.delay:
            parts.append(f"{self.delay:.3g} delay of others")
        return f"{self.total:.3g} s ({' + '.join(parts)})"


def _earliest(router: Disaggregated) -> Router:
    return EarliestFirstToken(router.machine, machines=router.machines)


@attrs.define(kw_only=True)
class Disaggregated(Router):
    """Computes a prompt elsewhere than it is decoded, where that is faster.

    *decode* chooses the worker that answers, among those with the role; then
    the prompt is computed there or on the worker that *prefill* chooses,
    whichever costs less:

        here  = queue + own uncached prompt + delay of those who decode here
        there = queue + own uncached prompt + delay of others + transfer

    Both sides read the one index, so a prefix held by either counts: at a high
    hit rate there is little to compute and the prompt stays, as a short one
    does.  A worker that decodes is held up by a prompt in its batch, which is
    what disaggregation is for (Zhong et al., "DistServe", OSDI 2024): each
    request running there waits about as long as the prompt takes.

    Roles come from the workers and may change at any time, so any ratio of
    prefill to decode workers works; a worker with both roles serves as either.

    Attributes:
        machine: Rates of workers that name no machine of *machines*.
        machines: Rates by the name in `Worker.machine`, for a mixed fleet.
        prefill: Chooses where prompts are computed, by these rates if not given.
        decode: Chooses where answers are generated, likewise.
        link: What moving KV costs; it also pairs the two.
        min_uncached_tokens: If given, decides alone: prompts with as many
            tokens that the decode worker does not hold are computed elsewhere.
        delay_weight: Seconds of one request's delay that one of another's is.

    >>> Disaggregated(min_uncached_tokens=16).min_uncached_tokens
    16
    """

    machine: Machine = attrs.field(factory=Machine)
    machines: Mapping[str, Machine] = attrs.field(factory=dict)
    prefill: Router = attrs.field(default=attrs.Factory(_earliest, takes_self=True))
    decode: Router = attrs.field(default=attrs.Factory(_earliest, takes_self=True))
    link: LinkSeconds = attrs.field(factory=UniformLink)
    min_uncached_tokens: int | None = None
    delay_weight: float = 1.0

    def cost(self, request: Request, view: View) -> Floats:
        return self.decode.cost(request, view)

    def route(self, request: Request, view: View) -> Decision | None:
        able = view.workers.able(Role.DECODE)
        decoding = self.decode.pick(request, view.only(able))
        if decoding is None:
            return None
        row = view.workers.ids.index(decoding.decode)
        prefilling = self._prefilling(request, view, row)
        if prefilling is None:
            return self._stay(decoding, "no other worker can compute prompts now")
        there_row = view.workers.ids.index(prefilling.decode)
        uncached = int(view.uncached_tokens(request)[row])
        if self.min_uncached_tokens is not None:
            if uncached < self.min_uncached_tokens:
                why = (
                    f"{uncached} uncached tokens, threshold {self.min_uncached_tokens}"
                )
                return self._stay(decoding, why)
            note = f"{uncached} uncached tokens on {decoding.decode}"
            return self._split(decoding, prefilling, note)
        here = self._seconds(request, view, row)
        there = self._seconds(request, view, there_row, to=row)
        compared = (
            f"{here} on {decoding.decode}, {uncached} tokens uncached,"
            f" against {there} on {prefilling.decode}"
        )
        if there.total < here.total:
            return self._split(decoding, prefilling, compared)
        return self._stay(decoding, compared)

    def _prefilling(self, request: Request, view: View, row: int) -> Decision | None:
        """Choose the best other worker to compute the prompt for that in *row*."""
        able = view.workers.able(Role.PREFILL).copy()
        able[row] = False
        others = view.only(able)
        if not len(others.workers):
            return None
        moved = self._moved_bytes(request, view, row)
        ids = others.workers.ids
        seconds = np.asarray(self.link(ids, view.workers.ids[row], moved), np.float64)
        if seconds.shape != (len(ids),):
            raise PolicyError(f"{self.link!r} gave {seconds.shape} for {len(ids)}")
        return _Paired(self.prefill, seconds).pick(request, others)

    def _seconds(
        self, request: Request, view: View, row: int, to: int | None = None
    ) -> _Seconds:
        """Price the prompt on the worker in *row*, decoded there or in row *to*."""
        workers, machine = view.workers, self._machine(view, row)
        cached = float(view.cached_tokens(request)[row, -1])
        uncached = float(view.uncached_tokens(request)[row])
        compute = machine.prefill_s(uncached, cached)
        queued = float(workers.prefill_tokens[row])
        # Those who wait for their own first token there are in the queue.
        decoding = workers.running_requests[row] - workers.waiting_requests[row]
        stall = max(compute - machine.decode_floor_s, 0.0)
        transfer = 0.0
        if to is not None:
            moved = self._moved_bytes(request, view, to)
            transfer = float(self.link([workers.ids[row]], workers.ids[to], moved)[0])
        return _Seconds(
            queue=queued * machine.prefill_s_per_token,
            compute=compute,
            transfer=transfer,
            delay=self.delay_weight * float(decoding) * stall,
        )

    def _moved_bytes(self, request: Request, view: View, row: int) -> float:
        """Bytes of KV that the worker in *row* does not hold."""
        held = int(view.cached_tokens(request)[row, Tier.GPU])
        missing = max(request.prompt_tokens - held, 0)
        return missing * float(self._machine(view, row).kv_bytes_per_token)

    def _machine(self, view: View, row: int) -> Machine:
        return self.machines.get(view.workers.facts[row].machine, self.machine)

    def _stay(self, decoding: Decision, why: str) -> Decision:
        note = f"not disaggregated: {why}"
        return attrs.evolve(decoding, notes=(*decoding.notes, note))

    def _split(self, decoding: Decision, prefilling: Decision, why: str) -> Decision:
        return attrs.evolve(
            decoding,
            prefill=prefilling.decode,
            notes=(*decoding.notes, f"disaggregated: {why}"),
            prefill_decision=prefilling,
        )
