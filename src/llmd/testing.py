"""Contracts that a policy of your own inherits as tests.

Subclass one in a test file and say how to make the policy; pytest finds the
rest:

    class TestMyRouter(RouterContract):
        def make(self):
            return MyRouter()

Nothing here imports pytest, so it works under any runner that collects
`test_...` methods.
"""

from __future__ import annotations

import abc
import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np

from .cluster import Cluster
from .commands import Dispatch, Fail
from .decision import Decision
from .events import (
    BlocksStored,
    FirstToken,
    RequestArrived,
    RequestEnded,
    SignalsReported,
    WorkerJoined,
)
from .index import PrefixIndex
from .router import Router
from .types import Request, Signals, Tier, Worker, WorkerId
from .view import View

_CLOCKS = ("time", "monotonic", "perf_counter", "time_ns", "monotonic_ns")


class Cheated(AssertionError):
    """A policy used a clock or randomness that it was not given."""


@contextlib.contextmanager
def sealed() -> Iterator[None]:
    """Let every clock and every global source of randomness raise `Cheated`.

    >>> with sealed():
    ...     time.monotonic()
    Traceback (most recent call last):
    ...
    llmd.testing.Cheated: time.monotonic is not view.now
    """

    def cheat(name: str, instead: str) -> Any:
        def caught(*_: Any, **__: Any) -> Any:
            raise Cheated(f"{name} is not {instead}")

        return caught

    with contextlib.ExitStack() as stack:
        for name in _CLOCKS:
            patch = mock.patch.object(time, name, cheat(f"time.{name}", "view.now"))
            stack.enter_context(patch)
        for module, label, names in (
            (random, "random", ("random", "choice", "randrange", "randint", "shuffle")),
            (np.random, "numpy.random", ("random", "rand", "randint", "choice")),
            (np.random, "numpy.random", ("default_rng", "permutation", "shuffle")),
        ):
            for name in names:
                patch = mock.patch.object(
                    module, name, cheat(f"{label}.{name}", "view.rng")
                )
                stack.enter_context(patch)
        yield


def fleet(workers: int = 5, router: Router | None = None, seed: int = 0) -> Cluster:
    """Return a cluster at work: loads, caches and reports that differ.

    >>> cluster = fleet(workers=3)
    >>> cluster.view.workers.ids
    ('w0', 'w1', 'w2')
    """
    cluster = Cluster(seed=seed) if router is None else Cluster(router, seed=seed)
    for number in range(workers):
        worker = Worker(id=f"w{number}", block_tokens=16 << number % 2, kv_blocks=500)
        cluster.handle(WorkerJoined(0.0, worker))
        names = request("seen").hashes(worker.block_tokens)[: 2 + number]
        tier = Tier.CPU if number % 3 == 2 else Tier.GPU
        cluster.handle(BlocksStored(0.0, worker.id, names, worker.block_tokens, tier))
        if number % 2:
            signals = Signals(waiting_requests=number, kv_usage=0.1 * number)
            cluster.handle(SignalsReported(0.0, worker.id, signals))
    for number in range(2 * workers):
        new = request(f"load{number}", start=1000 * number, tokens=80 + 40 * number)
        for command in cluster.handle(RequestArrived(1.0, new)):
            if isinstance(command, Dispatch) and number % 3:
                chosen = command.decision.decode
                cluster.handle(FirstToken(1.0, chosen, new.id, 0))
    return cluster


def request(id: str = "r", start: int = 0, tokens: int = 300, **names: Any) -> Request:
    """Return a request for *tokens* consecutive token ids."""
    return Request(
        id=id, prompt=range(start, start + tokens), max_new_tokens=16, **names
    )


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
        view, router = fleet().view, self.make()
        with sealed():
            for new in self.requests():
                router.route(new, view)

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
        cluster = Cluster(self.make(), seed=3)
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

    def _decisions(self) -> list[Decision | None]:
        view, router = fleet(seed=7).view, self.make()
        return [router.route(new, view) for new in self.requests() for _ in range(3)]


class PrefixIndexContract(abc.ABC):
    """What every `PrefixIndex` must hold to."""

    @abc.abstractmethod
    def make(self) -> PrefixIndex:
        """Return a new index."""

    def filled(self) -> tuple[PrefixIndex, tuple[WorkerId, ...]]:
        """Return an index that was told and hinted things, and its workers."""
        index = self.make()
        ids = ("a", "b", "c")
        for id in ids:
            index.join(Worker(id=id, block_tokens=16), 0.0)
        names = request().hashes(16)
        index.store("a", names, 16, Tier.GPU, 1.0)
        index.store("b", names[:9], 16, Tier.CPU, 1.0)
        index.expect("b", request("sent"), 2.0)
        index.settle("b", request("sent"), 0, 2.5)
        index.expect("c", request("sending"), 3.0)
        return index, ids

    def test_counts_tokens_of_every_worker_and_tier(self) -> None:
        """Whole tokens, none negative, none beyond the prompt, more with each tier."""
        index, ids = self.filled()
        for new in (request(), request("short", tokens=5), request("c", start=9000)):
            held = index.match(new, ids, 4.0)
            assert held.shape == (3, len(Tier)), held.shape
            assert held.dtype.kind == "i", held.dtype
            assert (held >= 0).all(), held
            assert (held <= new.prompt_tokens).all(), held
            assert (np.diff(held, axis=1) >= 0).all(), "a slower tier holds less"

    def test_answers_in_the_order_asked(self) -> None:
        """Row i is worker i, whatever workers are asked for."""
        index, ids = self.filled()
        held = index.match(request(), ids, 4.0)
        for order in ((2, 1, 0), (1,), (0, 2), ()):
            asked = tuple(ids[row] for row in order)
            want = [held[row].tolist() for row in order]
            assert index.match(request(), asked, 4.0).tolist() == want

    def test_a_stranger_holds_nothing(self) -> None:
        """A worker that never joined has zeros and does no harm."""
        index, ids = self.filled()
        held = index.match(request(), (*ids, "stranger"), 4.0)
        assert held[3].tolist() == [0] * len(Tier)

    def test_forgets_what_it_is_told_to(self) -> None:
        """A cleared worker holds nothing and may store again."""
        index, ids = self.filled()
        for id in ids:
            index.forget(id, "", 5.0)
        assert not index.match(request(), ids, 5.0).any()
        index.store("a", request().hashes(16), 16, Tier.GPU, 6.0)
        index.expect("a", request("sent"), 6.0)

    def test_a_worker_that_left_is_a_stranger(self) -> None:
        """Late events about it change nothing of the others."""
        index, _ = self.filled()
        index.leave("a", 5.0)
        before = index.match(request(), ("b", "c"), 5.0).tolist()
        index.remove("a", request().hashes(16), Tier.GPU, 5.0)
        index.settle("a", request("sent"), 0, 5.0)
        assert index.match(request(), ("b", "c"), 5.0).tolist() == before
        assert not index.match(request(), ("a",), 5.0).any()

    def test_keeps_salts_and_adapters_apart(self) -> None:
        """What one tenant cached is nothing to another."""
        index, ids = self.filled()
        for other in (request(salt="x"), request(lora="l")):
            assert not index.match(other, ids, 4.0).any()

    def test_is_deterministic(self) -> None:
        """The same calls give the same counts."""
        (one, ids), (other, _) = self.filled(), self.filled()
        left, right = (i.match(request(), ids, 4.0) for i in (one, other))
        assert left.tolist() == right.tolist()

    def test_uses_no_clock_and_no_global_randomness(self) -> None:
        """Time is the `at` it is given."""
        request().hashes(16)
        with sealed():
            index, ids = self.filled()
            index.match(request(), ids, 4.0)
            index.diagnose(request(), "a", 4.0)

    def test_diagnoses_in_words(self) -> None:
        """Findings are sentences, of strangers too."""
        index, _ = self.filled()
        for id in ("a", "b", "c", "stranger"):
            for finding in index.diagnose(request("cold", start=9000), id, 4.0):
                assert isinstance(finding, str), finding
                assert finding, "an empty finding"

    def test_repeats_do_no_harm(self) -> None:
        """Stores and removals may be told twice."""
        index, ids = self.filled()
        names = request().hashes(16)
        index.store("a", names, 16, Tier.GPU, 5.0)
        index.remove("b", names, Tier.CPU, 5.0)
        once = index.match(request(), ids, 5.0).tolist()
        index.store("a", names, 16, Tier.GPU, 5.0)
        index.remove("b", names, Tier.CPU, 5.0)
        assert index.match(request(), ids, 5.0).tolist() == once


def _columns(view: View) -> dict[str, Any]:
    workers = view.workers
    return {
        name: getattr(workers, name).copy()
        for name in ("running_requests", "waiting_requests", "prefill_tokens")
    }
