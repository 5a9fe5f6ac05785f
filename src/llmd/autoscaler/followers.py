"""Policies that follow one signal, each a few lines."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable

import attrs

from ..errors import InvalidPolicy, NoSignal
from ..recommendation import Proposal
from ..timeslice import Infeasible
from ..view import View
from .amounts import positive
from .interface import Autoscaler


@attrs.define(kw_only=True)
class TargetConcurrency(Autoscaler):
    """Keeps requests per worker near a target.

    Attributes:
        requests_per_worker: Running and waiting together.

    >>> TargetConcurrency(requests_per_worker=5, max_workers=4).patience
    300.0
    """

    requests_per_worker: float = attrs.field(validator=positive)

    def wanted(self, view: View) -> float:
        running = int(view.workers.running_requests.sum())
        return (running + len(view.waiting)) / self.requests_per_worker


@attrs.define(kw_only=True)
class TargetQueue(Autoscaler):
    """Keeps waiting requests per worker near a target, as llm-d's guides do.

    A short queue says little of how few workers would do: combine it with
    `TargetConcurrency` or `TargetKV` in `Largest`.

    Attributes:
        waiting_per_worker: In llmd and in the engines' own queues together.

    >>> TargetQueue(waiting_per_worker=5, max_workers=4).tolerance
    0.0
    """

    waiting_per_worker: float = attrs.field(validator=positive)

    def wanted(self, view: View) -> float:
        queued = int(view.workers.waiting_requests.sum())
        return (queued + len(view.waiting)) / self.waiting_per_worker


@attrs.define(kw_only=True)
class TargetWait(Autoscaler):
    """Keeps the longest wait in llmd's queue near a target.

    Attributes:
        wait: Seconds.
        looked_at: Requests looked at, next first; bounds the cost.

    >>> TargetWait(wait=2.0, max_workers=4).looked_at
    1000
    """

    wait: float = attrs.field(validator=positive)
    looked_at: int = 1000

    def wanted(self, view: View) -> float:
        heads = itertools.islice(view.waiting, self.looked_at)
        arrived = [request.arrived_at for request in heads]
        if not arrived:
            return 0.0
        supply = max(int(view.workers.supply().sum()), 1)
        return supply * (view.now - min(arrived)) / self.wait


@attrs.define(kw_only=True)
class TargetKV(Autoscaler):
    """Keeps the KV caches filled to a target.

    What waits in llmd counts as if it were there already.

    Attributes:
        usage: Part of the KV cache of each worker, in (0, 1].

    >>> TargetKV(max_workers=4).usage
    0.8
    """

    usage: float = attrs.field(default=0.8, validator=positive)

    def wanted(self, view: View) -> float:
        workers = view.workers
        held = workers.kv_tokens[workers.supply()]
        tokens = int(workers.context_tokens.sum()) + view.waiting.prompt_tokens
        if not len(held):
            return float(tokens > 0)
        return tokens / (self.usage * float(held.mean()))


@attrs.define(kw_only=True)
class TargetMetric(Autoscaler):
    """Keeps any measurement per worker near a target: requests a second, say.

    Attributes:
        measure: Returns the sum over all workers now; it may raise NoSignal,
            and a NaN means the same.
        per_worker: What one worker should bear.

    >>> TargetMetric(measure=lambda view: 12.0, per_worker=5, max_workers=4).per_worker
    5
    """

    measure: Callable[[View], float]
    per_worker: float = attrs.field(validator=positive)

    def wanted(self, view: View) -> float:
        measured = self.measure(view)
        if math.isnan(measured):
            raise NoSignal("the measurement is NaN")
        return measured / self.per_worker


@attrs.define(kw_only=True)
class TargetUtilisation(Autoscaler):
    """Keeps GPU utilisation near a target; warns that this seldom works.

    A batch of one keeps a GPU as busy, by this measure, as a batch of 256: it
    stands near 1 whenever anything runs, so the count climbs to its maximum
    and stays (seen in the GH200 study of llm-d, as elsewhere).

    Attributes:
        measure: Returns the mean utilisation of ready workers, in [0, 1].
        utilisation: To keep.
    """

    measure: Callable[[View], float]
    utilisation: float = attrs.field(default=0.8, validator=positive)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        warnings.warn(
            "GPU utilisation is near 1 whenever a batch runs, however small:"
            " scale on concurrency, queue, KV usage or latency instead",
            stacklevel=3,
        )

    def wanted(self, view: View) -> float:
        measured = self.measure(view)
        if math.isnan(measured):
            raise NoSignal("the utilisation is NaN")
        return int(view.workers.ready().sum()) * measured / self.utilisation


@attrs.define(kw_only=True)
class Crowded(Autoscaler):
    """Wants workers for the engines that a shared GPU cannot serve in time.

    To be told of by a GPU, and used among others:

        crowded = Crowded()
        gpu = SharedGpu(arbiter, complain=crowded.hear)
        policy = Largest(policies=(latency, crowded), max_workers=8)

    >>> Crowded().complaint is None
    True
    """

    complaint: Infeasible | None = attrs.field(default=None, init=False)
    _there: int | None = attrs.field(default=None, init=False)

    def hear(self, what: Infeasible | None) -> None:
        """Note what the GPU cannot do; None: all is well again."""
        if what != self.complaint:
            self.complaint, self._there = what, None

    def wanted(self, view: View) -> float:
        if self.complaint is None:
            return 0.0
        if self._there is None:
            # As many more as do not fit, and no more while it lasts.
            self._there = len(view.workers)
        return self._there + self.complaint.engines - self.complaint.engines_that_fit


@attrs.define(kw_only=True)
class Largest(Autoscaler):
    """Follows whichever of several policies wants the most.

    Only their wishes count, not their bounds.  If one of them cannot tell,
    the count may grow and not shrink, as in an HPA with several metrics; one
    that raises, or wants a NaN or an infinity, cannot tell, and the advice says
    so.

    Attributes:
        policies: To ask.

    >>> queue = TargetQueue(waiting_per_worker=5)
    >>> running = TargetConcurrency(requests_per_worker=10)
    >>> len(Largest(policies=(queue, running), max_workers=4).policies)
    2
    """

    policies: tuple[Autoscaler, ...]

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if not self.policies:
            raise InvalidPolicy("the largest of nothing")

    def proposals(self, view: View) -> tuple[Proposal, ...]:
        return tuple([p for policy in self.policies for p in _told(policy, view)])

    def wanted(self, view: View) -> float:
        told = [p.workers for p in self.proposals(view) if p.valid]
        if not told:
            raise NoSignal("none of the policies can tell")
        return max(told)


def _told(policy: Autoscaler, view: View) -> list[Proposal]:
    """Return what *policy* proposes; what is no count cannot be told."""
    try:
        return [
            attrs.evolve(p, workers=math.nan, note=f"it wants {p.workers} workers")
            if math.isinf(p.workers)
            else p
            for p in policy.proposals(view)
        ]
    except Exception as error:  # one of several must not speak for all
        return [Proposal.untold(type(policy).__name__, error)]


@attrs.define(kw_only=True)
class Consolidation(Autoscaler):
    """Lets a worker go only if the others would still have room.

    The check N/(N-1): with one worker fewer, the load of each must stay under
    the ceiling, so that removing it cannot be what calls for it again.

    Attributes:
        policy: Whose wish it follows.
        ceiling: Load after a removal, as a part of what the policy aims at.

    >>> inner = TargetConcurrency(requests_per_worker=5)
    >>> Consolidation(policy=inner, max_workers=4).ceiling
    0.9
    """

    policy: Autoscaler
    ceiling: float = attrs.field(default=0.9, validator=positive)

    def proposals(self, view: View) -> tuple[Proposal, ...]:
        there = float(self._current(view))
        return tuple([self._eased(p, there) for p in self.policy.proposals(view)])

    def wanted(self, view: View) -> float:
        return self._eased(Proposal("", self.policy.wanted(view)), math.inf).workers

    def _eased(self, wish: Proposal, there: float) -> Proposal:
        if not wish.valid or math.ceil(wish.workers) >= there:
            return wish
        eased = min(there, wish.workers / self.ceiling)
        note = f"{wish.note} load of the rest under {self.ceiling:.3g}".strip()
        return Proposal(wish.name, eased, note)
