"""The state of a cluster, and the moves a request makes in it.

A request is in exactly one place: waiting, booked, or gone.

    arrives -> waiting -> booked -> gone
                  ^         |
                  +---------+   its worker failed and nothing was streamed
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import attrs
import numpy as np
from sortedcontainers import SortedList

from . import commands as c
from .autoscaler import Autoscaler
from .balancer import Fcfs, QueueBalancer
from .books import Booking, Books
from .decision import Decision
from .errors import (
    DeadlineExceeded,
    DuplicateRequest,
    LlmdError,
    PolicyError,
    PromptTooLong,
    UnknownAdapter,
    UnknownModel,
)
from .fleet import Fleet
from .index import ExactIndex, PrefixIndex
from .router import EarliestFirstToken, Router
from .types import Request, RequestId, WorkerId
from .view import View
from .waiting import WaitingRequests


@attrs.define(eq=False)
class Core:
    """Policies, books and queue of a cluster; see `Cluster` for its face."""

    router: Router = attrs.field(factory=EarliestFirstToken)
    balancer: QueueBalancer = attrs.field(factory=Fcfs)
    autoscaler: Autoscaler | None = None
    index: PrefixIndex = attrs.field(factory=ExactIndex)
    max_attempts: int = 3
    seed: int = 0

    view: View = attrs.field(init=False)
    fleet: Fleet = attrs.field(factory=Fleet, init=False)
    books: Books = attrs.field(init=False)
    waiting: WaitingRequests = attrs.field(factory=WaitingRequests, init=False)
    models: set[str] = attrs.field(factory=set, init=False)
    attempts: dict[RequestId, int] = attrs.field(factory=dict, init=False)
    deadlines: Any = attrs.field(factory=SortedList, init=False)
    asked_workers: int | None = attrs.field(default=None, init=False)
    faults: deque[LlmdError] = attrs.field(factory=lambda: deque(maxlen=16), init=False)

    def __attrs_post_init__(self) -> None:
        self.books = Books(self.fleet)
        self.view = View(
            now=-math.inf,
            rng=np.random.default_rng(self.seed),
            workers=self.fleet.workers,
            waiting=self.waiting,
            match=self._match,
        )

    def check(self, request: Request) -> None:
        """Raise InvalidRequest if *request* can never be served here."""
        id, model = request.id, request.model
        if id in self.waiting or id in self.books:
            raise DuplicateRequest(f"request id {id!r} is in use")
        longest = self.fleet.longest(model)
        if model and model not in self.models and longest is None:
            known = ", ".join(sorted(self.models)) or "none"
            raise UnknownModel(f"no worker serves model {model!r}; known: {known}")
        if request.lora and not self.fleet.knows(request.lora):
            raise UnknownAdapter(f"no worker has the adapter {request.lora!r}")
        tokens = request.prompt_tokens + (request.max_new_tokens or 1)
        if longest is not None and tokens > longest:
            raise PromptTooLong(
                f"{request.prompt_tokens} prompt tokens and"
                f" {request.max_new_tokens or 1} new ones make {tokens},"
                f" model {model!r} takes {longest}"
            )

    def expire(self, id: RequestId) -> list[c.Command]:
        """End a request whose deadline has passed."""
        waiting = self.waiting.remove(id)
        if waiting is not None:
            self.gone(waiting)
            return [c.Fail(waiting, DeadlineExceeded(f"{id!r} waited too long"))]
        booking = self.books.get(id)
        assert booking is not None, "a deadline outlived its request"
        aborts = self.abort(booking)
        self.gone(booking.request)
        error = DeadlineExceeded(f"{id!r} ran past its deadline")
        return [*aborts, c.Fail(booking.request, error)]

    def scale(self, at: float) -> list[c.Command]:
        """Ask the autoscaler; raises PolicyError with nothing changed."""
        if self.autoscaler is None:
            return []
        before = self.view.now
        self.view.advance(at)
        try:
            workers = self.autoscaler.target(self.view)
        except Exception as error:
            self.view.advance(before)
            raise policy_error(self.autoscaler, error) from error
        if workers == self.asked_workers:
            return []
        self.asked_workers = workers
        return [c.Scale(workers)]

    def dispatch(self, model: str | None = None) -> list[c.Command]:
        """Send on whatever can go, for one model or for all."""
        commands: list[c.Command] = []
        for name in self.waiting.models() if model is None else (model,):
            while (request := self.waiting.peek(name)) is not None:
                try:
                    decision = self._place(request)
                    if decision is None:
                        break
                    uncached = self._announce(request, decision)
                except Exception as error:
                    self.waiting.remove(request.id)
                    self.gone(request)
                    commands.append(c.Fail(request, policy_error(self.router, error)))
                    continue
                self.waiting.remove(request.id)
                self.books.book(request, decision, uncached)
                self.view.advance(self.view.now)
                commands.append(c.Dispatch(request, decision))
        return commands

    def _place(self, request: Request) -> Decision | None:
        """Ask the policies where *request* may and should go now."""
        view = self.view
        able = self.fleet.serving(request.model, request.lora)
        room = np.asarray(self.balancer.room(request, view))
        if room.shape != able.shape or room.dtype != np.bool_:
            raise PolicyError(
                f"{self.balancer!r} gave room {room.dtype}{room.shape} for"
                f" {len(able)} workers"
            )
        tokens = request.prompt_tokens + (request.max_new_tokens or 1)
        able = able & room & (view.workers.max_model_tokens >= tokens)
        if not able.any():
            return None
        return self.router.route(request, view.only(able))

    def _announce(self, request: Request, decision: Decision) -> int:
        """Tell the policies of a decision; return the uncached prompt tokens.

        The index comes last: what it expects, a booking will settle.
        """
        for worker in (decision.first, decision.decode):
            if worker not in self.fleet:
                raise PolicyError(f"{self.router!r} chose {worker!r}: not there")
        row = self.fleet.row(decision.first)
        uncached = int(self.view.uncached_tokens(request)[row])
        self.balancer.dispatched(request, uncached, self.view)
        self.index.expect(decision.first, request, self.view.now)
        if decision.first != decision.decode:
            self.index.expect(decision.decode, request, self.view.now)
        return uncached

    def charge(self, booking: Booking, tokens: int) -> list[c.Command]:
        """Tell the balancer of generated tokens; if it fails, so does the request."""
        try:
            self.balancer.generated(booking.request, tokens, self.view)
        except Exception as error:
            aborts = self.abort(booking)
            self.gone(booking.request)
            failure = policy_error(self.balancer, error)
            return [*aborts, c.Fail(booking.request, failure)]
        return []

    def retry(self, booking: Booking, error: LlmdError) -> c.Command:
        """Queue a failed request again if its client cannot tell, else fail it."""
        request = booking.request
        self.release(booking)
        attempts = self.attempts.get(request.id, 0) + 1
        if booking.streamed or attempts >= self.max_attempts:
            self.gone(request)
            return c.Fail(request, error)
        self.attempts[request.id] = attempts
        try:
            self.waiting.push(self.balancer.key(request, self.view), request)
        except Exception as failure:
            self.gone(request)
            return c.Fail(request, policy_error(self.balancer, failure))
        return c.Requeue(request)

    def abort(self, booking: Booking) -> list[c.Command]:
        """Stop a booked request wherever it runs."""
        aborts = [c.Abort(worker, booking.request.id) for worker in booking.workers]
        self.release(booking)
        return [*aborts]

    def release(self, booking: Booking) -> None:
        """End a booking, whatever came of it."""
        for worker in booking.workers:
            if not booking.streamed:
                self.index.settle(worker, booking.request, None, self.view.now)
        self.books.release(booking)

    def gone(self, request: Request) -> None:
        """Forget a request that is in no place any more."""
        self.attempts.pop(request.id, None)
        if request.deadline < math.inf:
            self.deadlines.discard((request.deadline, request.id))

    def judge(self, booking: Booking, worker: WorkerId, error: str | None) -> None:
        """Tell the router how a dispatch ended; what it raises blames no request."""
        try:
            self.router.ended(booking.request, worker, error, self.view)
        except Exception as failure:
            self.faults.append(policy_error(self.router, failure))

    def refresh(self) -> list[c.Command]:
        """Show policies the changed fleet and see what it makes possible."""
        self.view.workers = self.fleet.workers
        return self.dispatch()

    def _match(self, request: Request, workers: Any, at: float) -> Any:
        return self.index.match(request, workers, at)


def policy_error(policy: object, error: Exception) -> LlmdError:
    """Return what a failing policy costs the request it was asked about."""
    if isinstance(error, PolicyError):
        return error
    wrapped = PolicyError(f"{policy!r} raised {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
