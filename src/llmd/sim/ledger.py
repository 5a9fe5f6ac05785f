"""What becomes of each request of a run, as it becomes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import attrs

from .. import events as e
from ..cluster import Cluster
from ..errors import InvalidRequest
from ..types import RequestId
from .outcome import Outcome
from .report import Slo
from .workload import Job, Workload


@attrs.define(eq=False)
class Ledger:
    """Outcomes by request, and who follows whom.

    Attributes:
        outcomes: In order of the workload.
        open: Requests that have not ended, those yet to come included.
        misses_left: How many more may miss before a run is given up.
        progress: Called with the number of requests that ended.

    >>> from llmd.sim import workloads
    >>> ledger = Ledger.of(workloads.batch(requests=3), None)
    >>> ledger.open, len([*ledger.heads()])
    (3, 3)
    """

    outcomes: dict[RequestId, Outcome] = attrs.field(factory=dict)
    open: int = 0
    misses_left: float = math.inf
    progress: Callable[[int], object] | None = None
    _slo: Slo = attrs.field(factory=Slo, init=False)
    _followers: dict[RequestId, list[Job]] = attrs.field(factory=dict, init=False)

    @classmethod
    def of(cls, workload: Workload, give_up: Slo | None) -> Ledger:
        """Open a ledger for *workload*.

        Args:
            workload: Whose requests.
            give_up: A run is over once this cannot be met any more.

        Raises:
            InvalidRequest: Two jobs have one id, or one follows nobody.
        """
        ledger = cls()
        for job in workload.jobs:
            if job.id in ledger.outcomes:
                raise InvalidRequest(f"two jobs are called {job.id!r}")
            ledger.outcomes[job.id] = Outcome(job)
            if job.follows:
                ledger._followers.setdefault(job.follows, []).append(job)
        strangers = ledger._followers.keys() - ledger.outcomes.keys()
        if strangers:
            raise InvalidRequest(f"jobs follow {sorted(strangers)[:3]}: not there")
        reached = [job.id for job in ledger.heads()]
        for id in reached:
            reached += [job.id for job in ledger._followers.get(id, ())]
        if len(reached) < len(ledger.outcomes):
            rings = sorted(ledger.outcomes.keys() - set(reached))
            raise InvalidRequest(f"jobs follow each other in a ring: {rings[:3]}")
        ledger.open = len(ledger.outcomes)
        if give_up is not None:
            ledger._slo = give_up
            # As `Report.meets` counts, whatever floats make of 0.1 * 10.
            least = math.ceil(give_up.attainment * len(workload) - 1e-9)
            ledger.misses_left = len(workload) - least
        return ledger

    def heads(self) -> Iterator[Job]:
        """Yield the jobs that come by themselves."""
        for outcome in self.outcomes.values():
            if not outcome.job.follows:
                yield outcome.job

    def note(self, event: e.Event) -> None:
        """Write down what an engine did."""
        match event:
            case e.PrefillEnded(request_id=id):
                self.outcomes[id].also_found(event.cached_tokens)
            case e.FirstToken(request_id=id):
                outcome = self.outcomes[id]
                outcome.generated += 1
                if outcome.generated > 1:  # it goes on after another worker
                    return
                outcome.first = event.at
                outcome.found = event.cached_tokens
                if event.at - outcome.arrived > self._slo.ttft_s:
                    self.misses_left -= 1
            case e.TokensGenerated(request_id=id, tokens=tokens):
                self.outcomes[id].generated += tokens

    def tell_who_waits(self, cluster: Cluster) -> None:
        """Say of those that wait at the end that nobody ever took them."""
        for id, outcome in self.outcomes.items():
            if not outcome.status and not outcome.attempts and cluster.waits(id):
                outcome.status = "never sent to a worker"

    def close(self, id: RequestId, status: str, at: float) -> list[Job]:
        """End a request; return those that may follow it now.

        Whoever follows one that failed has failed too.
        """
        outcome = self.outcomes[id]
        if outcome.status:
            return []
        outcome.status, outcome.ended = status, at
        self.open -= 1
        if self.progress is not None:
            self.progress(len(self.outcomes) - self.open)
        followers = self._followers.pop(id, [])
        if status == "completed":
            return followers
        for job in followers:
            self.close(job.id, "predecessor failed", at)
        return []
