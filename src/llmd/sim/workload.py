"""What is asked of a fleet, and when: jobs and the workloads they make."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from ..amounts import as_real, as_whole
from ..blocks import Prompt
from ..errors import InvalidRequest, shown
from ..types import Request, RequestId
from ..view import Floats

_LONGEST = 1 << 40
_LATEST_S = 1e11
"""Later than that a float cannot tell microseconds apart."""


def _whole(value: Any) -> Any:
    whole = as_whole(value)
    return value if whole is None else whole


@attrs.frozen(kw_only=True, eq=False)
class Job:
    """A request with what only the simulator may know of it.

    Attributes:
        request: What the scheduler sees; `arrived_at` is set when it arrives.
        output_tokens: How long the answer will be.
        at: When it arrives, seconds; for a follower, set by its predecessor.
        answer: Prompt and answer as the prompt they make for a next turn; None
            if nothing ever follows up on it.
        follows: Id of the request whose answer the client reads first.
        think_s: Seconds from that answer to this request.
        cancel_after_s: Seconds after arrival at which the client gives up.

    Raises:
        InvalidRequest: The answer has no length, or one above the request's
            `max_new_tokens`; or a time is none.
    """

    request: Request
    output_tokens: int = attrs.field(converter=_whole)
    at: float = 0.0
    answer: Prompt | None = None
    follows: RequestId = ""
    think_s: float = 0.0
    cancel_after_s: float = math.inf

    def __attrs_post_init__(self) -> None:
        tokens, most = self.output_tokens, self.request.max_new_tokens
        if not (type(tokens) is int and 1 <= tokens <= _LONGEST):
            raise InvalidRequest(
                f"output_tokens of {self.request.id!r} is {shown(tokens)}, must be a"
                " whole number of at least 1"
            )
        if most is not None and tokens > most:
            raise InvalidRequest(
                f"{self.request.id!r} has an answer of {tokens} tokens and wants"
                f" {most} at most"
            )
        times = as_real(self.at), as_real(self.think_s)
        leaves = as_real(self.cancel_after_s)
        if not (all(0.0 <= time <= _LATEST_S for time in times) and leaves >= 0.0):
            raise InvalidRequest(
                f"{self.request.id!r} comes at {shown(self.at)}, thinks for"
                f" {shown(self.think_s)} and leaves after {shown(self.cancel_after_s)}:"
                f" times are seconds, from 0 to {_LATEST_S:g}"
            )

    @property
    def id(self) -> RequestId:
        """Id of its request."""
        return self.request.id


def _ordered(jobs: Sequence[Job]) -> tuple[Job, ...]:
    return tuple(sorted(jobs, key=lambda job: job.at))


@attrs.frozen(kw_only=True, eq=False)
class Workload:
    """Jobs in order of arrival.

    Attributes:
        name: For reports.
        jobs: Those that arrive by themselves in order of `at`, and followers.
        block_tokens: Smallest block size at which all prompts have names.
        remake: Makes the same kind of workload from another seed, if it can; None
            where `jobs` are others than those it came with, as after
            `attrs.evolve(workload, jobs=...)`: other seeds would not have them.

    >>> from llmd.sim import workloads
    >>> dialogue = workloads.dialogue(rate=2.0, requests=100, seed=1)
    >>> len(dialogue), dialogue.rate > 0
    (100, True)
    >>> round(dialogue.at_rate(5.0).rate, 6)
    5.0
    """

    name: str
    jobs: tuple[Job, ...] = attrs.field(converter=_ordered, repr=False)
    block_tokens: int = 16
    remake: Callable[[int], Workload] | None = attrs.field(default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        remake = self.remake
        if remake is not None and not isinstance(remake, _Made):
            object.__setattr__(self, "remake", _Made(remake, self.jobs))
        elif remake is not None and not remake.made(self.jobs):
            object.__setattr__(self, "remake", None)

    def __len__(self) -> int:
        return len(self.jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self.jobs)

    @property
    def span_s(self) -> float:
        """Seconds from the first arrival to the last that is scheduled."""
        times = [job.at for job in self.jobs if not job.follows]
        return max(times) - min(times) if times else 0.0

    @property
    def rate(self) -> float:
        """Requests a second, over the span of scheduled arrivals."""
        return len(self.jobs) / self.span_s if self.span_s else math.inf

    @property
    def prompt_tokens(self) -> int:
        """Sum of all prompts."""
        return sum([job.request.prompt_tokens for job in self.jobs])

    @property
    def output_tokens(self) -> int:
        """Sum of all answers."""
        return sum([job.output_tokens for job in self.jobs])

    def at_rate(self, rate: float) -> Workload:
        """Return the same jobs, arrivals stretched to *rate* requests a second.

        Think times stay: people do not think faster when more of them come.
        """
        if not 0.0 < as_real(rate) < math.inf or not self.span_s:
            raise InvalidRequest(f"cannot bring {self.name!r} to {rate} requests/s")
        return self._stretched(self.rate / rate)

    def seeded(self, seed: int) -> Workload:
        """Return another of its kind; without `remake`, other arrival times.

        A workload that was read from a file keeps its jobs, each moved later by up
        to the mean gap.
        """
        whole = as_whole(seed)
        if whole is None or whole < 0:
            raise InvalidRequest(f"seed is {shown(seed)}, must be a whole number")
        seed = whole
        if self.remake is not None:
            return self.remake(seed)
        return self.jittered(self.span_s / max(len(self), 1), seed)

    def first(self, requests: int) -> Workload:
        """Return its first *requests* jobs and followers of theirs."""
        kept: list[Job] = []
        ids: set[RequestId] = set()
        for job in self.jobs:
            if len(kept) < requests and (not job.follows or job.follows in ids):
                kept.append(job)
                ids.add(job.id)
        return attrs.evolve(self, jobs=kept, remake=None)

    def jittered(self, width_s: float, seed: int = 0) -> Workload:
        """Return it with each arrival moved by up to *width_s* later.

        Undoes clocks that were rounded down, as in the Mooncake traces (3 s).
        """
        if not 0.0 <= as_real(width_s) <= _LATEST_S:
            raise InvalidRequest(f"arrivals cannot move by up to {shown(width_s)} s")
        rng = np.random.default_rng(seed)
        moves = rng.uniform(0.0, width_s, len(self.jobs)).tolist()
        jobs = self._moved(dict(zip(self.jobs, moves, strict=True)))
        remake = self._changed("jittered", (width_s, seed))
        return attrs.evolve(self, jobs=jobs, remake=remake)

    def arriving(self, times: Floats) -> Workload:
        """Return its scheduled jobs, in order, at *times*, shape (n,)."""
        times = np.asarray(times, dtype=np.float64)
        heads = [job for job in self.jobs if not job.follows]
        if len(times) < len(heads):
            raise InvalidRequest(f"{len(times)} times for {len(heads)} arrivals")
        moves = zip(heads, times.tolist(), strict=False)
        jobs = self._moved({job: at - job.at for job, at in moves})
        return attrs.evolve(self, jobs=jobs, remake=None)

    def _stretched(self, factor: float) -> Workload:
        start = min([job.at for job in self.jobs if not job.follows])
        moves = {job: (job.at - start) * (factor - 1.0) for job in self.jobs}
        remake = self._changed("_stretched", (factor,))
        return attrs.evolve(self, jobs=self._moved(moves), remake=remake)

    def _changed(self, method: str, arguments: tuple[float, ...]) -> _Changed | None:
        """Return what remakes it and calls *method*."""
        if not isinstance(self.remake, _Made):
            return None
        return _Changed(self.remake.remake, method, arguments)

    def _moved(self, moves: Mapping[Job, float]) -> list[Job]:
        """Return its jobs, moved in time with their deadlines.

        Followers move as those do whom they follow, and so stay behind them.
        """
        jobs = {job.id: job for job in self.jobs}
        known: dict[RequestId, float] = {}
        for job in self.jobs:
            line = [job]
            while line[-1].id not in known and line[-1].follows in jobs:
                line.append(jobs[line[-1].follows])
            move = known.get(line[-1].id, moves.get(line[-1], 0.0))
            known |= {one.id: move for one in line}
        return [_later(job, known[job.id]) for job in self.jobs]


def _later(job: Job, move: float) -> Job:
    request = job.request
    if request.deadline < math.inf:
        request = attrs.evolve(request, deadline=request.deadline + move)
    return attrs.evolve(job, at=job.at + move, request=request)


@attrs.frozen
class _Made:
    """What makes workloads anew, with the jobs of the one that it belongs to."""

    remake: Callable[[int], Workload]
    jobs: tuple[Job, ...]

    def __call__(self, seed: int) -> Workload:
        return self.remake(seed)

    def made(self, jobs: tuple[Job, ...]) -> bool:
        same = len(jobs) == len(self.jobs)
        return same and all(map(operator.is_, jobs, self.jobs))


@attrs.frozen
class _Changed:
    """Remakes a workload and changes it; unlike a closure it can be pickled."""

    remake: Callable[[int], Workload]
    method: str
    arguments: tuple[float, ...]

    def __call__(self, seed: int) -> Workload:
        changed: Workload = getattr(self.remake(seed), self.method)(*self.arguments)
        return changed
