"""How much a worker may hold: rooms, which compose by all having to agree."""

from __future__ import annotations

import abc
import math
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import attrs
import numpy as np

from ..amounts import a_number
from ..booking import Booking
from ..errors import PolicyError
from ..types import Request, RequestId, WorkerId
from ..view import Mask, View
from .amounts import (
    COUNT,
    COUNT_LIMIT,
    COUNT_LIMIT_IF_ANY,
    LIMIT,
    POSITIVE,
    WAIT,
    a_callable,
)
from .interface import Listener

_ROUNDING = 1e-9


def part_of(limit: Any, share: float) -> Any:
    """Return *share* of a limit on requests, in whole ones, at least one.

    >>> float(part_of(100, 0.55)), float(part_of(3, 0.5))
    (55.0, 2.0)
    """
    return np.ceil(np.multiply(limit, share) - _ROUNDING)


class Room(Listener, abc.ABC):
    """Says which workers have room for one more request.

    >>> class OneEach(Room):
    ...     def open(self, request, share, view):
    ...         return view.workers.running_requests < 1
    """

    own_lane: ClassVar[bool] = False
    """It counts no requests but those of the lane that it gives them: others
    passing who waits there do not make it wait longer."""

    @abc.abstractmethod
    def open(self, request: Request, share: float, view: View) -> Mask:
        """Say which workers of *view* have room, shape (W,).

        Args:
            request: For whom; the next in its lane.
            share: What part of the room it may fill, in (0, 1].
            view: The workers that could serve it.
        """

    def lane(self, request: Request, view: View) -> Hashable:
        """Return what to tell apart, so that one kind does not hold up another."""
        return ()

    def could(self, request: Request, view: View) -> Mask:
        """Say which workers may have room for *request* some time, shape (W,)."""
        return np.ones(len(view.workers), dtype=np.bool_)

    def opens_at(self, view: View, after: float) -> float:
        """Return the first time past *after* at which time alone makes room."""
        return math.inf


@attrs.frozen
class FixedRoom(Room):
    """Fixed limits on the requests and tokens that run on a worker.

    An idle worker always has room, and one with no prompt under way has room
    for a prompt of any length.

    Attributes:
        requests: Running at once, at most; None for what it batches.
        kv_usage: Part of its KV cache that prompts and outputs so far may
            fill, the new prompt included.
        prefill_tokens: Prompt tokens under way, at most.

    >>> FixedRoom(requests=8).kv_usage
    inf
    """

    requests: float | None = attrs.field(default=None, validator=COUNT_LIMIT_IF_ANY)
    kv_usage: float = attrs.field(default=math.inf, validator=LIMIT)
    prefill_tokens: float = attrs.field(default=math.inf, validator=LIMIT)

    def open(self, request: Request, share: float, view: View) -> Mask:
        workers = view.workers
        limit = workers.max_running if self.requests is None else self.requests
        running = workers.running_requests
        room: Mask = running < part_of(limit, share)
        if self.kv_usage < math.inf:
            tokens = workers.context_tokens + request.prompt_tokens
            room = room & (tokens <= self.kv_usage * share * workers.kv_tokens)
        if self.prefill_tokens < math.inf:
            under_way = workers.prefill_tokens
            tokens = under_way + view.uncached_tokens(request)
            fits = (under_way == 0) | (tokens <= self.prefill_tokens * share)
            room = room & fits
        idle: Mask = running == 0
        return room | idle


@attrs.define
class _Pace:
    """What an AIMD limit knows of one worker."""

    limit: float
    since: float
    itl_s: deque[float]
    ttft_s: deque[float]
    busiest: int = 0
    wanted: bool = False


@attrs.define(eq=False, kw_only=True)
class AimdRoom(Room):
    """A limit on running requests that holds latency at a target, by feedback.

    Chiu and Jain, "Analysis of the increase and decrease algorithms for
    congestion avoidance", Computer Networks 17, 1989: every *window_s*, if
    the 99th percentile is above the target, the worker's limit is multiplied
    by *decrease*; if it is not and the limit was reached, *increase* is added.
    Only samples of that window count, at most 4096.

    Attributes:
        itl_s: Target for the time between tokens, 99th percentile, seconds.
        ttft_s: Target for the time from dispatch to first token, likewise.
        start: Requests on a worker, to begin with.
        lowest: Requests on a worker, at least.
        highest: Requests on a worker, at most.
        increase: Requests added a window.
        decrease: Factor of a window that was too slow.
        window_s: Seconds between looks.
        samples: Needed for a look; a window with fewer goes on.

    >>> AimdRoom(itl_s=0.05, start=16).limit("a")
    16
    """

    itl_s: float = attrs.field(default=math.inf, validator=LIMIT)
    ttft_s: float = attrs.field(default=math.inf, validator=LIMIT)
    start: int = attrs.field(default=32, validator=COUNT)
    lowest: int = attrs.field(default=1, validator=COUNT)
    highest: int = attrs.field(default=4096, validator=COUNT)
    increase: float = attrs.field(default=1.0, validator=POSITIVE)
    decrease: float = attrs.field(default=0.8, validator=POSITIVE)
    window_s: float = attrs.field(default=1.0, validator=POSITIVE)
    samples: int = attrs.field(default=20, validator=COUNT)
    _paces: dict[WorkerId, _Pace] = attrs.field(factory=dict, init=False, repr=False)
    _grown: bool = attrs.field(default=False, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if not self.lowest <= self.start <= self.highest:
            limits = f"{self.lowest}, {self.start}, {self.highest}"
            raise PolicyError(f"lowest <= start <= highest: they are {limits}")
        if self.decrease >= 1:
            raise PolicyError(f"decrease is {self.decrease}, must be in (0, 1)")

    def limit(self, worker: WorkerId) -> int:
        """Return how many requests *worker* may run now."""
        pace = self._paces.get(worker)
        return self.start if pace is None else int(pace.limit)

    def opens_at(self, view: View, after: float) -> float:
        return view.now if self._grown else math.inf

    def open(self, request: Request, share: float, view: View) -> Mask:
        self._grown = False
        ids = view.workers.ids
        limits = np.array([self.limit(id) for id in ids], dtype=np.float64)
        room: Mask = view.workers.running_requests < part_of(limits, share)
        for row in np.flatnonzero(~room).tolist():
            pace = self._paces.get(ids[row])
            if pace is not None:
                pace.wanted = True
        return room

    def dispatched(self, booking: Booking, view: View) -> None:
        worker = booking.decision.decode
        pace = self._pace(worker, view)
        row = view.workers.ids.index(worker)
        running = int(view.workers.running_requests[row]) + 1
        pace.busiest = max(pace.busiest, running)

    def generated(self, booking: Booking, tokens: int, view: View) -> None:
        pace = self._pace(booking.decision.decode, view)
        if math.isnan(booking.last_token_at):
            pace.ttft_s.append(view.now - booking.dispatched_at)
        else:
            pace.itl_s.append((view.now - booking.last_token_at) / tokens)
        if view.now >= pace.since + self.window_s:
            self._look(pace, view.now)

    def _look(self, pace: _Pace, now: float) -> None:
        enough = [
            (samples, target)
            for samples, target in (
                (pace.itl_s, self.itl_s),
                (pace.ttft_s, self.ttft_s),
            )
            if target < math.inf and len(samples) >= self.samples
        ]
        if not enough:
            return
        if any(np.percentile(list(s), 99) > target for s, target in enough):
            pace.limit = max(pace.limit * self.decrease, float(self.lowest))
        elif pace.wanted or pace.busiest >= int(pace.limit):
            pace.limit = min(pace.limit + self.increase, float(self.highest))
            self._grown = True
        pace.since, pace.busiest, pace.wanted = now, 0, False
        pace.itl_s.clear()
        pace.ttft_s.clear()

    def _pace(self, worker: WorkerId, view: View) -> _Pace:
        pace = self._paces.get(worker)
        if pace is None:
            if len(self._paces) > 2 * len(view.workers):
                for gone in self._paces.keys() - set(view.workers.ids):
                    del self._paces[gone]
            pace = _Pace(
                float(self.start), view.now, deque(maxlen=4096), deque(maxlen=4096)
            )
            self._paces[worker] = pace
        return pace


@attrs.define(eq=False, kw_only=True)
class LongPrefillCap(Room):
    """Lets only a few long prompts be computed on a worker at once.

    Long prefills that run together slow every decode beside them, and a
    prompt that arrives behind one in an engine waits for all its chunks
    (vLLM issue 10774), whatever its priority.  A part of the workers can be
    kept free of long prompts, always the same, so that short ones find a quick
    place and their own prefixes there.  Requests that are long wait in a lane of
    their own, so that others pass them.

    Attributes:
        at_once: Long prompts under way on a worker, at most.
        long_tokens: Uncached tokens from which a prompt is long.
        spare: Part of the workers, last in id order, that compute no long
            prompt, in [0, 1]; one at least always may.
        of: Whose prompts are counted and capped.

    >>> LongPrefillCap(long_tokens=2048).at_once
    1
    """

    own_lane: ClassVar[bool] = True

    at_once: float = attrs.field(default=1, validator=COUNT_LIMIT)
    long_tokens: int = attrs.field(default=4096, validator=WAIT)
    spare: float = attrs.field(default=0.0, validator=a_number(most=1))
    of: Callable[[Request], bool] = attrs.field(
        default=lambda request: True, validator=a_callable, repr=False
    )
    _long: dict[WorkerId, dict[RequestId, Booking]] = attrs.field(
        factory=dict, init=False, repr=False
    )

    def lane(self, request: Request, view: View) -> Hashable:
        if request.prompt_tokens < self.long_tokens or not self.of(request):
            return "short"
        uncached = view.uncached_tokens(request) >= self.long_tokens
        if not len(uncached) or uncached.all():
            return "long"
        # It may wait for the workers that hold it: short ones must not wait with it.
        return "held" if uncached.any() else "short"

    def open(self, request: Request, share: float, view: View) -> Mask:
        short = request.prompt_tokens < self.long_tokens or not self.of(request)
        if short:
            return np.ones(len(view.workers), dtype=np.bool_)
        busy = np.array([self.under_way(id) for id in view.workers.ids], dtype=np.int64)
        room: Mask = (busy < self.at_once) & self._long_ones(view)
        return room | (view.uncached_tokens(request) < self.long_tokens)

    def could(self, request: Request, view: View) -> Mask:
        if request.prompt_tokens < self.long_tokens or not self.of(request):
            return super().could(request, view)
        return self._long_ones(view) | (
            view.uncached_tokens(request) < self.long_tokens
        )

    def _long_ones(self, view: View) -> Mask:
        """Say which workers are not kept free of long prompts, shape (W,)."""
        workers = len(view.workers)
        most = max(math.floor(workers * (1.0 - self.spare) + _ROUNDING), 1)
        return np.arange(workers) < most

    def under_way(self, worker: WorkerId) -> int:
        """Count the long prompts being computed on *worker*."""
        bookings = self._long.get(worker)
        if not bookings:
            return 0
        done = [id for id, booking in bookings.items() if booking.prefilled]
        for id in done:
            del bookings[id]
        return sum(booking.booked for booking in bookings.values())

    def dispatched(self, booking: Booking, view: View) -> None:
        if booking.uncached_tokens >= self.long_tokens and self.of(booking.request):
            long = self._long.setdefault(booking.decision.first, {})
            long[booking.request.id] = booking

    def generated(self, booking: Booking, tokens: int, view: View) -> None:
        self.ended(booking, view)

    def ended(self, booking: Booking, view: View) -> None:
        worker = booking.decision.first
        long = self._long.get(worker)
        if long is not None:
            long.pop(booking.request.id, None)
            if not long:
                del self._long[worker]


_A_BIT = 1e-3
"""Of a token: what counts as some budget left, whatever floats make of none."""


@attrs.define(eq=False, kw_only=True)
class PromptBudget(Room):
    """Spreads prompts out: so many uncached tokens a window on each worker.

    A bucket of *tokens* that fills at *tokens* / *window_s*.  A prompt may
    overdraw it, so that none is too long for ever, and the next waits until
    that is made good.

    Attributes:
        tokens: Uncached prompt tokens dispatched in a window.
        window_s: Its length, seconds.

    >>> PromptBudget(tokens=8192, window_s=0.25).tokens
    8192
    """

    tokens: float = attrs.field(default=8192.0, validator=POSITIVE)
    window_s: float = attrs.field(default=0.1, validator=POSITIVE)
    _filled: dict[WorkerId, tuple[float, float]] = attrs.field(
        factory=dict, init=False, repr=False
    )

    def open(self, request: Request, share: float, view: View) -> Mask:
        left = [self.left(id, view.now) for id in view.workers.ids]
        room: Mask = np.array(left, dtype=np.float64) >= _A_BIT
        return room

    def left(self, worker: WorkerId, now: float) -> float:
        """Return the tokens left for *worker*; below zero it is overdrawn."""
        tokens, at = self._filled.get(worker, (self.tokens, now))
        return min(tokens + (now - at) * self.tokens / self.window_s, self.tokens)

    def opens_at(self, view: View, after: float) -> float:
        times = [
            at + (2 * _A_BIT - tokens) * self.window_s / self.tokens
            for worker in view.workers.ids
            for tokens, at in [self._filled.get(worker, (self.tokens, 0.0))]
            if tokens < _A_BIT
        ]
        return min([at for at in times if at > after], default=math.inf)

    def dispatched(self, booking: Booking, view: View) -> None:
        worker = booking.decision.first
        if worker not in self._filled and len(self._filled) > 2 * len(view.workers):
            for gone in self._filled.keys() - set(view.workers.ids):
                del self._filled[gone]
        left = self.left(worker, view.now) - booking.uncached_tokens
        self._filled[worker] = (left, view.now)
