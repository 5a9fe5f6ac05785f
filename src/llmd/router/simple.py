"""Routers that look at load, at chance or at the session alone."""

from __future__ import annotations

import bisect
import hashlib

import attrs
import numpy as np

from ..decision import Term
from ..types import Request, WorkerId
from ..view import Floats, View
from .interface import Router, TermRouter


@attrs.define
class RoundRobin(Router):
    """Sends each request to the next worker in id order.

    >>> RoundRobin()
    RoundRobin()
    """

    _last: WorkerId = attrs.field(default="", init=False, repr=False)

    def cost(self, request: Request, view: View) -> Floats:
        ids = view.workers.ids
        costs: Floats = np.arange(len(ids), dtype=np.float64)
        if ids:
            turn = bisect.bisect_right(ids, self._last) % len(ids)
            costs = np.roll(costs, turn)
            self._last = ids[turn]
        return costs


@attrs.define
class Random(Router):
    """Sends each request anywhere, all workers equally likely.

    >>> Random()
    Random()
    """

    def cost(self, request: Request, view: View) -> Floats:
        return np.zeros(len(view.workers), dtype=np.float64)


@attrs.define
class LeastLoaded(TermRouter):
    """Sends each request to the worker with the fewest running.

    >>> LeastLoaded()
    LeastLoaded()
    """

    def terms(self, request: Request, view: View) -> tuple[Term, ...]:
        running = view.workers.running_requests.astype(np.float64)
        return (Term("running", running, "requests", running),)


@attrs.define
class LeastWork(TermRouter):
    """Sends each request where the least prompt work is outstanding.

    Its own uncached tokens count, so a cached prefix is worth what it saves;
    a running request counts as *decode_tokens* of work.

    Attributes:
        decode_tokens: Prompt tokens that delay others as much as one running
            request does.

    >>> LeastWork().decode_tokens
    64.0
    """

    decode_tokens: float = 64.0

    def terms(self, request: Request, view: View) -> tuple[Term, ...]:
        queued = view.workers.prefill_tokens.astype(np.float64)
        own = view.uncached_tokens(request).astype(np.float64)
        running = view.workers.running_requests.astype(np.float64)
        return (
            Term("queued prefill", queued, "tokens", queued),
            Term("own prefill", own, "tokens", own),
            Term("running", running, "requests", running, self.decode_tokens),
        )


@attrs.define
class PowerOfTwo(Router):
    """Compares two random workers, which bounds herding on stale loads.

    Mitzenmacher, "The power of two choices in randomized load balancing",
    IEEE TPDS 12(10), 2001.

    >>> PowerOfTwo()
    PowerOfTwo()
    """

    def cost(self, request: Request, view: View) -> Floats:
        costs = np.full(len(view.workers), np.inf)
        drawn = view.rng.permutation(len(view.workers))[:2]
        costs[drawn] = view.workers.running_requests[drawn]
        return costs


@attrs.define
class SessionAffinity(Router):
    """Keeps a session on one worker by rendezvous hashing.

    A worker that joins takes over only the sessions it wins, one that leaves
    hands out only its own (Thaler and Ravishankar, "Using name-based mappings
    to increase hit rates", IEEE/ACM ToN 6(1), 1998).  Requests without a
    session are routed by *otherwise*.

    Attributes:
        otherwise: For requests of no session.

    >>> SessionAffinity().otherwise
    LeastLoaded()
    """

    otherwise: Router = attrs.field(factory=LeastLoaded)

    def cost(self, request: Request, view: View) -> Floats:
        if not request.session:
            return self.otherwise.cost(request, view)
        return np.array(
            [_rendezvous(request.session, worker) for worker in view.workers.ids],
            dtype=np.float64,
        )


def _rendezvous(session: str, worker: WorkerId) -> int:
    # 52 bits, so that the number is exact as a float.
    digest = hashlib.blake2b(f"{len(session)}:{session}{worker}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 12
