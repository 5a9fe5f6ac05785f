"""Simulation in the loop: try each count on the load of the next minute."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import attrs
import numpy as np

from ..autoscaler import Autoscaler
from ..autoscaler.window import Meter, moment
from ..balancer import Fcfs
from ..cluster import Cluster
from ..errors import NoSignal
from ..machines import Machine
from ..recommendation import Proposal
from ..router import LeastLoaded, Router
from ..types import Request, State
from ..view import View
from . import workloads
from .face import fleet, simulate
from .report import Slo
from .workload import Job, Workload

_RUNNING = "rollout:running-"
_WAITING = "rollout:waiting-"


@attrs.define(kw_only=True)
class Rollout(Autoscaler):
    """Has the fewest workers on which a simulated minute keeps the promise.

    Every `interval` seconds it takes the fleet as it is, what waits and what
    runs, and lets requests of the lengths and at the rate of the last `window`
    seconds arrive for `horizon` seconds more, on one count after another.
    Equal clusters roll out alike: the arrivals come from `seed`.

    What it cannot see in a view it replaces: a running request has its mean
    rest to answer and no prompt left, and caches are empty.  A try takes as
    long as simulating its requests does, so mind the interval where the
    autoscaler shares a thread with a live server.

    It does not try on a `Cluster.fork()`.  A policy is handed a view and
    nothing else, which lets it stand inside another one and be asked of any
    fleet; a fork would bring the index and the router's memory along, at a
    cost that grows with them, and still not how far each engine is with what
    it runs, which only the engines know.

    Attributes:
        slo: What requests must keep; its attainment counts.
        machine: Step times of each worker.
        router: Makes the router to try with.
        horizon: Seconds of arrivals.
        window: Seconds over which arrivals are measured.
        interval: Seconds between two rollouts.
        most_requests: Simulated in one try, at most.
        seed: Of the arrivals tried.

    >>> Rollout(slo=Slo(ttft_s=1.0, tpot_s=0.05), max_workers=8).interval
    15.0
    """

    slo: Slo
    machine: Machine = attrs.field(factory=Machine)
    router: Callable[[], Router] = LeastLoaded
    horizon: float = 60.0
    window: float = 60.0
    interval: float = 15.0
    most_requests: int = 2000
    seed: int = 0
    _meters: dict[str, Meter] = attrs.field(factory=dict, init=False)
    _next: float = attrs.field(default=-math.inf, init=False)
    _last: tuple[int, str] = attrs.field(default=(0, ""), init=False)

    def proposals(self, view: View) -> tuple[Proposal, ...]:
        try:
            workers = self.wanted(view)
        except NoSignal as error:
            return (Proposal.untold("Rollout", error),)
        return (Proposal("Rollout", workers, self._last[1]),)

    def wanted(self, view: View) -> float:
        rates = self._measure(view)
        if view.now >= self._next:
            workload = self.load(view, rates)
            self._last = self._fewest(view, workload) if len(workload) else (0, "idle")
            self._next = view.now + self.interval
        return float(self._last[0])

    def load(self, view: View, rates: dict[str, float]) -> Workload:
        """Return what is there and what the next seconds will bring.

        Args:
            view: Of the fleet.
            rates: A second, of each of the view's totals by name.

        Raises:
            NoSignal: Requests run whose lengths were never seen.
        """
        totals = view.totals
        running = int(view.workers.running_requests.sum())
        if not totals.ended_requests and running:
            raise NoSignal("no answer has ended yet, so its length is not known")
        answer = totals.generated_tokens / max(totals.ended_requests, 1)
        rate, prompt = rates["requests"], 1.0
        if rate > 0:
            prompt = max(rates["uncached_tokens"] / rate, 1.0)
        waiting = itertools.islice(view.waiting, self.most_requests)
        jobs = [
            _job(attrs.evolve(request, id=f"{_WAITING}{row}"), answer)
            for row, request in enumerate(waiting)
        ]
        rest = max(answer / 2, 1.0)
        jobs += [
            _job(Request(id=f"{_RUNNING}{row}", prompt=[row]), rest)
            for row in range(min(running, self.most_requests))
        ]
        coming = min(round(rate * self.horizon), self.most_requests)
        if coming > 0:
            jobs += workloads.batch(
                rate=rate,
                requests=coming,
                prompt_tokens=prompt,
                answer_tokens=max(answer, 1.0),
                burstiness=1.0,
                seed=self.seed,
            ).jobs
        return Workload(name="rollout", jobs=jobs)

    def _measure(self, view: View) -> dict[str, float]:
        now, totals, rates = moment(view), view.totals, {}
        for name in ("requests", "uncached_tokens"):
            meter = self._meters.setdefault(name, Meter(self.window))
            rates[name] = meter.rate(now, getattr(totals, name))
        if any(math.isnan(rate) for rate in rates.values()):
            raise NoSignal("arrivals have not been watched long enough")
        return rates

    def _fewest(self, view: View, workload: Workload) -> tuple[int, str]:
        """Return the fewest workers that keep the promise, and what was tried."""
        low, high, tried = 0, self.max_workers, list[str]()
        # The count that is there is the likeliest answer: look around it.
        probe = self._current(view)
        while high - low > 1:
            probe = min(max(probe, low + 1), high - 1)
            kept = self._try(view, workload, probe)
            enough = kept >= self.slo.attainment
            low, high = (low, probe) if enough else (probe, high)
            beside = probe - 1 if enough else probe + 1
            probe = (low + high) // 2 if tried else beside
            tried.append(f"{high if enough else low} keep {kept:.1%}")
        return high, f"{len(workload)} requests tried: {', '.join(tried)}"

    def _try(self, view: View, workload: Workload, workers: int) -> float:
        facts = view.workers.facts
        like = facts[0] if facts else fleet(1)[0]
        report = simulate(
            lambda: Cluster(router=self.router(), balancer=Fcfs()),
            workload,
            workers=[
                attrs.evolve(like, id=f"w{row:03}", state=State.READY)
                for row in range(workers)
            ],
            machine=self.machine,
        )
        good = report.good(self.slo)
        # What runs already has its first token long since.
        new = np.array([not id.startswith(_RUNNING) for id in report.ids], dtype=bool)
        return float((good[new] if new.any() else good).mean())


def _job(request: Request, answer_tokens: float) -> Job:
    request = attrs.evolve(request, deadline=math.inf)
    tokens = max(round(answer_tokens), 1)
    return Job(
        request=request, output_tokens=min(tokens, request.max_new_tokens or tokens)
    )
