"""The contract of routers."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..cluster import Cluster
from ..commands import Dispatch, Fail
from ..decision import Decision
from ..events import FirstToken, RequestArrived, RequestEnded, WorkerJoined
from ..router import Router
from ..types import Request, Worker, WorkerId
from ..view import View
from .samples import fleet, request
from .seal import sealed


class RouterContract(abc.ABC):
    """What every `Router` must hold to."""

    @abc.abstractmethod
    def make(self) -> Router:
        """Return a new router."""

    def requests(self) -> Sequence[Request]:
        """Return requests to route: warm, cold, short, long, of a session."""
        return (
            request("warm"),
            request("cold", start=90_000),
            request("short", tokens=3),
            request("long", tokens=3000),
            request("session", session="s"),
            request("salted", salt="x"),
        )

    def test_prices_every_worker_with_a_number(self) -> None:
        """One number for each worker; infinity rules out, NaN says nothing."""
        for workers in (0, 1, 2, 7):
            view, router = fleet(workers).view, self.make()
            for new in self.requests():
                costs = np.asarray(router.cost(new, view), dtype=np.float64)
                assert costs.shape == (workers,), f"{workers} workers, {costs.shape}"
                assert not np.isnan(costs).any(), f"{costs} has a NaN"
                assert not (costs == -np.inf).any(), f"{costs}: minus infinity"

    def test_routes_somewhere_that_exists(self) -> None:
        """The decision is for workers of the view, or none at all."""
        view, router = fleet().view, self.make()
        for new in self.requests():
            decision = router.route(new, view)
            assert decision is not None, "it routes nowhere though workers are free"
            assert decision.decode in view.workers.ids
            assert decision.first in view.workers.ids

    def test_knows_no_worker_beyond_the_view(self) -> None:
        """Who has no room, or is not ready, is not in the view and not chosen."""
        view = fleet(6).view
        router = self.make()
        for number in range(40):
            kept = np.array(
                [(number >> row) & 1 or row == number % 6 for row in range(6)]
            )
            some = view.only(kept.astype(np.bool_))
            decision = router.route(request(f"r{number}", start=number), some)
            if decision is not None:
                assert decision.decode in some.workers.ids
                assert decision.first in some.workers.ids

    def test_leaves_an_empty_view_alone(self) -> None:
        """Without workers a request waits."""
        assert self.make().route(request(), fleet(0).view) is None

    def test_explains_itself(self) -> None:
        """The table of a decision can be printed, on the page and as HTML."""
        view, router = fleet().view, self.make()
        decision = router.route(request(), view)
        assert decision is not None
        assert decision.decode in str(decision.explain())
        assert "<table>" in decision.explain()._repr_html_()

    def test_is_deterministic(self) -> None:
        """Equal views and equal random numbers give equal decisions."""
        assert self._decisions() == self._decisions()

    def test_uses_no_clock_and_no_global_randomness(self) -> None:
        """Time is `view.now`, chance is `view.rng`."""
        view = fleet().view
        self.make()  # imports what it needs, which may ask for anything
        with sealed():
            router = self.make()
            for new in self.requests():
                router.route(new, view)
            _serve(Cluster(router, seed=3))

    def test_reads_the_view_and_leaves_it_alone(self) -> None:
        """Its columns belong to the cluster."""
        view, router = fleet().view, self.make()
        before = _columns(view)
        for new in self.requests():
            router.route(new, view)
        for name, column in _columns(view).items():
            assert np.array_equal(before[name], column, equal_nan=True), name

    def test_serves_a_cluster(self) -> None:
        """Under load, failures and a changing fleet, no request fails for it."""
        _serve(Cluster(self.make(), seed=3))

    def _decisions(self) -> list[Decision | None]:
        view, router = fleet(seed=7).view, self.make()
        return [router.route(new, view) for new in self.requests() for _ in range(3)]


def _serve(cluster: Cluster) -> None:
    """Let requests come and go, some of them broken."""
    for number in range(4):
        cluster.handle(WorkerJoined(0.0, Worker(id=f"w{number}", max_running=4)))
    where: dict[str, WorkerId] = {}
    for number in range(60):
        at = float(number)
        new = request(f"r{number}", start=50 * (number % 7), tokens=100 + number)
        commands = cluster.handle(RequestArrived(at, new))
        if len(where) > 8:
            id, worker = next(iter(where.items()))
            del where[id]
            error = "broke" if number % 11 == 0 else None
            if error is None:
                cluster.handle(FirstToken(at, worker, id, 0))
            commands += cluster.handle(RequestEnded(at, worker, id, error))
        for command in commands:
            assert not isinstance(command, Fail), command
            if isinstance(command, Dispatch):
                where[command.request.id] = command.decision.decode
    assert not cluster.waiting.faults, cluster.waiting.faults


def _columns(view: View) -> dict[str, Any]:
    workers = view.workers
    return {
        name: getattr(workers, name).copy()
        for name in ("running_requests", "waiting_requests", "prefill_tokens")
    }
