"""Routers that hold another one back, or add to its costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np

from ..decision import Decision, Term
from ..types import Request, Worker, WorkerId
from ..view import Floats, Mask, View, Workers
from .interface import Around

_COLD_KEPT = 1 << 12


def spare(costs: Floats, out: Mask) -> Floats:
    """Return *costs* with the workers *out* ruled out, unless that is all of them.

    >>> spare(np.array([1.0, 2.0]), np.array([True, False])).tolist()
    [inf, 2.0]
    >>> spare(np.array([1.0, 2.0]), np.array([True, True])).tolist()
    [1.0, 2.0]
    """
    kept: Floats = np.where(out, np.inf, costs)
    return kept if np.isfinite(kept).any() else costs


@attrs.define(kw_only=True)
class LoadGate(Around):
    """Lets a router of affinity choose only among workers of bearable load.

    A worker is out while it runs more than *ahead_requests* above the least
    loaded and more than *ratio* times as many: affinity alone sends everyone
    who shares a system prompt to one worker.

    Attributes:
        ahead_requests: Requests above the least loaded.
        ratio: Times the least loaded.

    >>> from llmd.router import SessionAffinity
    >>> LoadGate(router=SessionAffinity()).ahead_requests
    8
    """

    ahead_requests: int = 8
    ratio: float = 1.5

    def price(self, request: Request, view: View) -> tuple[Floats, tuple[Term, ...]]:
        costs, terms = self.router.price(request, view)
        running = view.workers.running_requests
        if not len(running):
            return costs, terms
        least = running.min()
        over = running > np.maximum(least + self.ahead_requests, self.ratio * least)
        return spare(costs, over), terms


@attrs.define(kw_only=True)
class SpreadCold(Around):
    """Gives requests that nobody holds anything of to each worker in turn.

    Where the costs of cold requests tie or nearly do, new prefixes pile up on
    few workers; the least recently so served goes first here, as in llm-d's
    no-hit-lru-scorer.  Warm requests are the router's own.

    Attributes:
        cold_tokens: A request is cold if no worker holds more of it.
        slack: Costs this far above the lowest, as a part of it, still count.

    >>> from llmd.router import LeastLoaded
    >>> SpreadCold(router=LeastLoaded()).cold_tokens
    0
    """

    cold_tokens: int = 0
    slack: float = 0.1
    _turns: dict[WorkerId, int] = attrs.field(factory=dict, init=False, repr=False)
    _given: int = attrs.field(default=0, init=False, repr=False)

    def pick(self, request: Request, view: View) -> Decision | None:
        held = view.cached_tokens(request)
        if held.size and held.max() > self.cold_tokens:
            return self.router.pick(request, view)
        priced = super().pick(request, view)
        if priced is None or priced.costs is None:
            return priced
        bound = priced.costs.min()
        near = np.flatnonzero(priced.costs <= bound + abs(bound) * self.slack)
        ids = view.workers.ids
        turn = min(near.tolist(), key=lambda row: self._turns.get(ids[row], 0))
        self._given += 1
        self._turns.pop(ids[turn], None)
        self._turns[ids[turn]] = self._given
        if len(self._turns) > _COLD_KEPT:
            del self._turns[next(iter(self._turns))]
        return attrs.evolve(priced, decode=ids[turn], tied=1, notes=("cold: its turn",))


@attrs.define(kw_only=True)
class KVBarrier(Around):
    """Adds a cost that rises without bound as a KV cache fills up.

    With u the part of the cache in use once the request is there, by the
    cluster's books or the engine's word, whichever is more:

        cost += seconds * (u - knee)**2 / (1 - u)   for knee < u < 1

    and a worker with no room at all is ruled out while another has some: an
    engine that preempts computes prompts twice.

    Attributes:
        seconds: Scale of the cost.
        knee: Where it begins, in [0, 1).

    >>> from llmd.router import LeastLoaded
    >>> KVBarrier(router=LeastLoaded()).knee
    0.7
    """

    seconds: float = 1.0
    knee: float = 0.7

    def usage(self, request: Request, view: View) -> Floats:
        """Return the part of each cache in use with *request* there, (W,)."""
        workers = view.workers
        tokens = request.prompt_tokens + (request.max_new_tokens or 1)
        booked = (workers.context_tokens + tokens) / workers.kv_tokens
        reported = workers.reported_kv_usage + tokens / workers.kv_tokens
        return np.fmax(booked, reported)

    def price(self, request: Request, view: View) -> tuple[Floats, tuple[Term, ...]]:
        costs, terms = self.router.price(request, view)
        used = self.usage(request, view)
        full = used >= 1.0
        above = np.clip(used - self.knee, 0.0, 1.0 - self.knee)
        with np.errstate(divide="ignore", invalid="ignore"):
            barrier = np.where(full, np.inf, above**2 / (1.0 - used))
        value = np.where(full, 0.0, barrier * self.seconds)
        term = Term("kv barrier", used, "used", value)
        return spare(costs + value, full), (*terms, term)


@attrs.define(kw_only=True)
class Surcharge(Around):
    """Adds to each worker's cost what follows from who it is.

    For what a fleet's shape costs: seconds to a rack or a zone further off, a
    price turned into seconds, a machine held in reserve.

    Attributes:
        seconds: Says how much for a worker, by its facts.
        name: Of the term.

    >>> from llmd.router import LeastWork
    >>> far = Surcharge.by_zone({"a": "here", "b": "there"},
    ...     {"here": 0.0, "there": 0.02}, router=LeastWork())
    >>> far.seconds(Worker(id="b"))
    0.02
    """

    seconds: Callable[[Worker], float]
    name: str = "distance"

    @classmethod
    def by_zone(
        cls,
        zones: Mapping[WorkerId, str],
        seconds: Mapping[str, float],
        *,
        router: Any,
    ) -> Surcharge:
        """Charge by zone: what is in no known zone is as far as the farthest."""
        farthest = max(seconds.values(), default=0.0)

        def charge(worker: Worker) -> float:
            return seconds.get(zones.get(worker.id, ""), farthest)

        return cls(router=router, seconds=charge)

    def price(self, request: Request, view: View) -> tuple[Floats, tuple[Term, ...]]:
        costs, terms = self.router.price(request, view)
        extra: Floats = view.workers.derived(self.seconds, _charges)
        return costs + extra, (*terms, Term(self.name, extra, "s", extra))


def _charges(workers: Workers, seconds: Callable[[Worker], float]) -> Floats:
    return np.array([seconds(worker) for worker in workers.facts], dtype=np.float64)


@attrs.define(kw_only=True)
class Stale(Around):
    """Holds silence against a worker, but never against all of them.

    An engine that reports less and less often is in trouble; a metrics outage
    that silences everyone says nothing of anyone and changes nothing here.

    Attributes:
        after: Seconds after which a report is stale.
        seconds: Cost of being stale while others are not.

    >>> from llmd.router import LeastWork
    >>> Stale(router=LeastWork()).after
    10.0
    """

    after: float = 10.0
    seconds: float = 1.0

    def price(self, request: Request, view: View) -> tuple[Floats, tuple[Term, ...]]:
        costs, terms = self.router.price(request, view)
        age = view.now - view.workers.reported_at
        stale = age > self.after  # false of a worker that never reported
        if not stale.any() or stale.all():
            return costs, terms
        extra = np.where(stale, self.seconds, 0.0)
        term = Term("stale", np.nan_to_num(age), "s since its report", extra)
        return costs + extra, (*terms, term)
