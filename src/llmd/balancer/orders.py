"""Orders of one queue: who goes first among those of one flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs

from ..amounts import kind
from ..machines import Machine
from ..types import Request
from ..view import Mask, View
from .amounts import AMOUNT, COUNT, WAIT, WAIT_IF_ANY, a_callable
from .interface import Place, QueueBalancer
from .verdict import ADMIT, Verdict

_MOST_HALVES = 900
"""Beyond that a worth, or work over it, would be no float any more."""


@attrs.define
class Fcfs(QueueBalancer):
    """First come, first served, within a priority.

    Attributes:
        max_running: Requests running at once on each worker, 0 to hold them
            all; None leaves it to what each batches at once.
        max_waiting: Requests waiting at once, in all; within a band, of it.

    >>> Fcfs(max_running=8).max_waiting
    100000
    """

    max_running: int | None = attrs.field(default=None, validator=WAIT_IF_ANY)
    max_waiting: int = attrs.field(default=100_000, validator=WAIT)

    def key(self, request: Request, view: View) -> Any:
        return request.priority

    def admit(self, request: Request, view: View) -> Verdict:
        if len(view.waiting) >= self.max_waiting:
            return Verdict(False, f"{len(view.waiting)} requests wait already", 1.0)
        return ADMIT

    def room(self, request: Request, view: View) -> Mask:
        if self.max_running is None:
            return super().room(request, view)
        return view.workers.running_requests < self.max_running


@attrs.define
class ShortestPrefill(Fcfs):
    """The least uncached prompt first, which lowers the mean wait most.

    Shortest job first, with linear ageing, which keeps the order of any two
    as time passes and so costs nothing.  Two requests waiting since t1 < t2
    go in order of arrival if their prompts differ by less than
    *ageing_tokens_per_s* * (t2 - t1) tokens, which bounds every wait.

    Attributes:
        ageing_tokens_per_s: Tokens of prompt that a second of waiting is worth.

    >>> ShortestPrefill(ageing_tokens_per_s=500.0).ageing_tokens_per_s
    500.0
    """

    ageing_tokens_per_s: float = attrs.field(default=1000.0, validator=AMOUNT)

    def key(self, request: Request, view: View) -> Any:
        return self._key(request, view, view.now)

    def place(self, request: Request, view: View, since: float) -> Place:
        return Place(self._key(request, view, since), self.flow(request))

    def tokens_ahead(self, request: Request, view: View) -> int:
        return 0  # how many are shorter is not counted

    def _key(self, request: Request, view: View, since: float) -> float:
        return _uncached(request, view) + self.ageing_tokens_per_s * since


@attrs.define
class WeightedShortest(Fcfs):
    """The most worth for each token of work first.

    Smith, "Various optimizers for single-stage production", Naval Research
    Logistics 3, 1956: by worth over length, which least delays the worth of
    all.  Work is the uncached prompt and the output cap.

    Attributes:
        worth: What a request is worth, above 0; more goes earlier.  A priority
            less is twice as much unless given.
        output_tokens: Taken for the output of a request without a cap.

    >>> WeightedShortest(output_tokens=128).output_tokens
    128
    """

    worth: Callable[[Request], float] = attrs.field(
        default=lambda request: _halved(request.priority),
        validator=a_callable,
        repr=False,
    )
    output_tokens: int = attrs.field(default=256, validator=COUNT)

    def tokens_ahead(self, request: Request, view: View) -> int:
        return 0  # how many are worth more is not counted

    def key(self, request: Request, view: View) -> Any:
        output = request.max_new_tokens or self.output_tokens
        return (_uncached(request, view) + output) / self.worth(request)


@attrs.define
class Edf(Fcfs):
    """The earliest deadline first, counted back by the prefill it needs.

    Liu and Layland, "Scheduling algorithms for multiprogramming in a
    hard-real-time environment", JACM 20(1), 1973: if any order meets all
    deadlines on one worker, this one does.  Slack is deadline - now - prefill;
    the least goes first, of equal ones that with the most cached.  Those whose
    slack is used up can no longer make it and go last, in order of arrival,
    so that they do not make others late.

    Attributes:
        machine: Gives the seconds that a prefill takes.
        margin_s: Slack kept for what cannot be foreseen (k standard
            deviations of the prefill's error).

    >>> Edf(margin_s=0.05).margin_s
    0.05
    """

    machine: Machine = attrs.field(factory=Machine, validator=kind(Machine), repr=False)
    margin_s: float = attrs.field(default=0.0, validator=AMOUNT)

    def due(self, request: Request, since: float) -> float:
        """Return when the first token should be there, seconds."""
        return request.deadline

    def tokens_ahead(self, request: Request, view: View) -> int:
        return 0  # how many are due earlier is not counted

    def key(self, request: Request, view: View) -> Any:
        return self.place(request, view, view.now).key

    def place(self, request: Request, view: View, since: float) -> Place:
        due = self.due(request, since)
        if due == math.inf:
            return Place((1, since, 0), self.flow(request))
        uncached = _uncached(request, view)
        start = due - self.machine.prefill_s(float(uncached)) - self.margin_s
        if view.now > start:
            return Place((2, since, 0), self.flow(request))
        until = math.nextafter(start, math.inf)
        return Place((0, start, uncached), self.flow(request), until=until)


@attrs.define
class SloDeadline(Edf):
    """Earliest deadline first, where the deadline is a promised time to first token.

    A request's own deadline counts too, if it is earlier.

    Attributes:
        ttft_s: Seconds promised, to all or as a function of the request.

    >>> order = SloDeadline(ttft_s=1.0)
    >>> order.due(Request(id="r", prompt=[1]), since=3.0)
    4.0
    """

    ttft_s: Callable[[Request], float] | float = attrs.field(default=2.0, repr=False)

    def __attrs_post_init__(self) -> None:
        if not callable(self.ttft_s):
            AMOUNT(self, attrs.fields(SloDeadline).ttft_s, self.ttft_s)

    def due(self, request: Request, since: float) -> float:
        promised = self.ttft_s
        seconds = promised(request) if callable(promised) else promised
        return min(request.deadline, since + seconds)


def _halved(times: int) -> float:
    return math.ldexp(1.0, -max(min(times, _MOST_HALVES), -_MOST_HALVES))


def _uncached(request: Request, view: View) -> int:
    """Return the least prompt tokens any worker would have to compute."""
    uncached = view.uncached_tokens(request)
    return int(uncached.min()) if len(uncached) else request.prompt_tokens
