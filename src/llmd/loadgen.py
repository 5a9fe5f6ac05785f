"""Load for real fleets: the simulator's workloads, and the simulator's report.

A generator that falls behind its own schedule measures itself: it sends later
than it should, in bunches, and the fleet looks slower or faster than it is.  So
every request's lag is measured, and no report is given where lags are not small
beside the times reported.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Protocol

import attrs
import numpy as np

from . import commands as c
from . import events as e
from .cluster import Cluster
from .errors import InvalidRequest, LlmdError
from .sim.ledger import Ledger
from .sim.load import WorkerLoad
from .sim.outcome import Outcome
from .sim.prompts import SegmentPrompt, tokens_of
from .sim.report import Report
from .sim.workload import Job, Workload
from .types import Request, RequestId, WorkerId
from .view import Floats

_COARSE_S = 1.5e-3
"""Seconds by which a timer of asyncio may be late: epoll counts milliseconds."""


class ScheduleLag(LlmdError):
    """The generator was too slow to measure anything but itself."""


class Piece(Protocol):
    """A piece of an answer, as `llmd.live` gives it."""

    @property
    def token_ids(self) -> tuple[int, ...]: ...

    @property
    def cached_tokens(self) -> int | None: ...


class Answers(Protocol):
    """What `llmd.live.Server` does; anything else that does it will do."""

    @property
    def cluster(self) -> Cluster: ...

    def generate(
        self, request: Request, sampling: Mapping[str, Any] | None = None
    ) -> AsyncIterator[Piece]: ...


@attrs.define(eq=False)
class LoadGenerator:
    """Sends a workload to a live fleet on schedule.

    Answers are made as long as the workload says (`ignore_eos`).  A next turn
    carries the answer that was really given, as a client would send it.

    Attributes:
        server: Where to.
        vocabulary: Ids of made-up tokens are below it.
        deadline_s: Each request is given up after so long.
        most_lag: The 99th percentile of lags may be this part of the median
            time to first token, and no more.
        clock: Seconds, running steadily.
        lags: Of each request sent: seconds behind schedule.

    >>> LoadGenerator.__name__
    'LoadGenerator'
    """

    server: Answers
    vocabulary: int = 32_000
    deadline_s: float = 600.0
    most_lag: float = 0.05
    clock: Callable[[], float] = time.monotonic
    lags: list[float] = attrs.field(factory=list, init=False)
    _ledger: Ledger = attrs.field(factory=Ledger, init=False)
    _start: float = attrs.field(default=0.0, init=False)
    _gaps: dict[WorkerId, list[tuple[float, ...]]] = attrs.field(
        factory=dict, init=False
    )
    _prompts: dict[RequestId, Any] = attrs.field(factory=dict, init=False)
    _given: dict[RequestId, list[int]] = attrs.field(factory=dict, init=False)

    async def run(self, workload: Workload) -> Report:
        """Send *workload* and report when all of it has ended.

        Raises:
            ScheduleLag: Lags were above `most_lag`.
            InvalidRequest: The generator ran before.
        """
        if self.lags:
            raise InvalidRequest("a load generator runs once: make another")
        self._ledger = Ledger.of(workload, None)
        for job in workload.jobs:  # made beforehand, as they take time
            self._prompts[job.id] = tokens_of(job.request.prompt, self.vocabulary)
        cluster = self.server.cluster
        before, cluster.observer = cluster.observer, self._watch(cluster.observer)
        first = min([job.at for job in self._ledger.heads()], default=0.0)
        try:
            with _left_to_lie():
                self._start = self.clock() - first
                async with asyncio.TaskGroup() as group:
                    for job in self._ledger.heads():
                        group.create_task(self._session(job, job.at, group))
        finally:
            cluster.observer = before
        report = self._report(workload)
        self._check(report)
        return report

    async def _session(self, job: Job, at: float, group: asyncio.TaskGroup) -> None:
        """Send one request when it is due, and then what follows it."""
        sent = await self._reached(at)
        self.lags.append(sent - at)
        outcome = self._ledger.outcomes[job.id]
        # Measured from when it was due: a late start is no excuse.
        outcome.arrived = at
        patience = asyncio.timeout(min(self.deadline_s, job.cancel_after_s))
        try:
            async with patience:
                await self._ask(outcome, sent)
            status = "completed" if outcome.generated else "no token came"
        except Exception as error:  # whatever it is, others are still measured
            status = f"{type(error).__name__}: {error}"
            if patience.expired():
                status = "cancelled"
        ended = self._now()
        for follower in self._ledger.close(job.id, status, ended):
            due = ended + follower.think_s
            group.create_task(self._session(follower, due, group))

    async def _reached(self, at: float) -> float:
        """Wait until *at*, and return the time then."""
        await asyncio.sleep(max(at - _COARSE_S - self._now(), 0.0))
        while (now := self._now()) < at:  # noqa: ASYNC110
            await asyncio.sleep(0)
        return now

    async def _ask(self, outcome: Outcome, sent: float) -> None:
        job = outcome.job
        request = attrs.evolve(
            job.request,
            prompt=self._prompt(job),
            max_new_tokens=job.output_tokens,
            arrived_at=self.clock(),
            deadline=job.request.deadline + self._start,
        )
        given = self._given[job.id] = []
        last = sent
        sampling = {"ignore_eos": True, "temperature": 0.0}
        async for piece in self.server.generate(request, sampling):
            now = self._now()
            if piece.cached_tokens is not None and outcome.found is None:
                outcome.found = piece.cached_tokens  # and not when it goes on elsewhere
            tokens = len(piece.token_ids)
            if not tokens:
                continue
            if outcome.generated:
                # As a run of steps: start, end, steps, requests, and no more.
                gap = (last, now, float(tokens), 1.0, 0.0, 0.0, 0.0)
                self._gaps.setdefault(outcome.worker, []).append(gap)
            else:
                outcome.first = now
            outcome.generated += tokens
            given += piece.token_ids
            last = now

    def _prompt(self, job: Job) -> Any:
        """Return the tokens of a prompt, with the answer really given in it."""
        tokens = self._prompts[job.id]
        if not job.follows:
            return tokens
        before = self._ledger.outcomes[job.follows].job
        own, past = job.request.prompt, before.answer
        given = self._given.get(job.follows, [])
        if not isinstance(own, SegmentPrompt) or not isinstance(past, SegmentPrompt):
            return tokens
        shared = own.segments[: len(past.segments)] == past.segments
        if shared and len(given) == before.output_tokens:
            # What was really said so far, in place of what was made up.
            sent = self._prompts[job.follows]
            tokens = np.concatenate(
                [sent, np.array(given, np.uint64), tokens[past.tokens :]]
            )
            self._prompts[job.id] = tokens
        return tokens

    def _watch(self, other: Callable[[Any], object] | None) -> Callable[[Any], None]:
        """Return an observer that sees who was sent where."""

        def observe(entry: Any) -> None:
            if other is not None:
                other(entry)
            if isinstance(entry, e.PrefillEnded):
                outcome = self._ledger.outcomes.get(entry.request_id)
                if outcome is not None:
                    outcome.also_found(entry.cached_tokens)
            elif isinstance(entry, c.Dispatch):
                outcome = self._ledger.outcomes.get(entry.request.id)
                if outcome is not None:
                    outcome.dispatched = self._now()
                    outcome.worker = entry.decision.decode
                    outcome.attempts += 1

        return observe

    def _now(self) -> float:
        return self.clock() - self._start

    def _report(self, workload: Workload) -> Report:
        cluster = self.server.cluster
        outcomes = [*self._ledger.outcomes.values()]
        loads = [
            self._load(worker.id, worker.kv_blocks, outcomes)
            for worker in cluster.view.workers.facts
        ]
        return Report.from_outcomes(
            outcomes, cluster.router, workload.name, tuple(loads)
        )

    def _load(
        self, worker: WorkerId, kv_blocks: int, outcomes: list[Outcome]
    ) -> WorkerLoad:
        mine = [o for o in outcomes if o.worker == worker and o.ended == o.ended]
        spans = sorted([(o.dispatched, o.ended) for o in mine])
        computed = [o.request.prompt_tokens - o.cached_tokens for o in mine]
        gaps = self._gaps.get(worker, [])
        runs: Floats = np.array(gaps, dtype=np.float64).reshape(len(gaps), 7)
        return WorkerLoad(
            id=worker,
            joined_at=min([start for start, _ in spans], default=0.0),
            left_at=max([end for _, end in spans], default=0.0),
            busy_s=_covered(spans),
            prompt_tokens=sum(computed),
            output_tokens=sum([o.generated for o in mine]),
            preemptions=0,
            runs=runs,
            kv_blocks=kv_blocks,
            modelled=False,
        )

    def _check(self, report: Report) -> None:
        late = float(np.percentile(self.lags, 99)) if self.lags else 0.0
        first = report.ttft(50)
        if not math.isnan(first) and late > self.most_lag * first:
            raise ScheduleLag(
                f"requests were sent up to {late * 1e3:.1f} ms late (p99), more than"
                f" {self.most_lag:.0%} of the median time to first token,"
                f" {first * 1e3:.1f} ms: give the generator a core of its own"
            )


def _covered(spans: list[tuple[float, float]]) -> float:
    """Return how long any of *spans*, sorted, lasted."""
    total, until = 0.0, -math.inf
    for start, end in spans:
        total += max(end - max(start, until), 0.0)
        until = max(until, end)
    return total


@contextlib.contextmanager
def _left_to_lie() -> Iterator[None]:
    """Leave what exists now out of garbage collections.

    An engine in this process leaves a million objects, and to look through them
    stops the generator, and the answers it times, for a third of a second.
    """
    frozen = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:  # else somebody else's choice
            gc.unfreeze()
