"""The state of a cluster, and the moves a request makes in it.

A request is in exactly one place: waiting, booked, or gone.

    arrives -> waiting -> booked -> gone
                  ^         |
                  +---------+   its worker failed, and nothing was streamed or
                                it can be resumed
"""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable
from typing import Any

import attrs
import numpy as np
from sortedcontainers import SortedList

from . import commands as c
from .amounts import kind
from .autoscaler import Autoscaler
from .balancer import Fcfs, QueueBalancer
from .booking import Booking
from .books import Books
from .copied import Copied
from .dispatching import dispatch
from .errors import (
    DeadlineExceeded,
    DuplicateRequest,
    LlmdError,
    PolicyError,
    PromptTooLong,
    UnknownAdapter,
    UnknownModel,
    WorkerLost,
    policy_error,
    shown,
)
from .fleet import Fleet
from .index import ExactIndex, PrefixIndex
from .peers import Peers
from .router import LeastDelay, Router
from .types import Request, RequestId, Worker, WorkerId
from .view import Mask, View
from .waiting import LaneName, WaitingRequests


@attrs.define(eq=False)
class Core(Copied):
    """Policies, books and queue of a cluster; see `Cluster` for its face."""

    router: Router = attrs.field(factory=LeastDelay, validator=kind(Router))
    _balancer: QueueBalancer = attrs.field(factory=Fcfs, validator=kind(QueueBalancer))
    autoscaler: Autoscaler | None = attrs.field(
        default=None, validator=attrs.validators.optional(kind(Autoscaler))
    )
    index: PrefixIndex = attrs.field(factory=ExactIndex, validator=kind(PrefixIndex))
    max_attempts: int = 3
    seed: int = 0

    view: View = attrs.field(init=False)
    fleet: Fleet = attrs.field(factory=Fleet, init=False)
    books: Books = attrs.field(init=False)
    waiting: WaitingRequests = attrs.field(init=False)
    peers: Peers = attrs.field(init=False)
    models: set[str] = attrs.field(factory=set, init=False)
    welcome: set[str] = attrs.field(factory=set, init=False)
    deadlines: Any = attrs.field(factory=SortedList, init=False)
    asked_workers: dict[str, int] = attrs.field(factory=dict, init=False)
    _limits: tuple[int, ...] = attrs.field(default=(), init=False)
    _looked_at: float = attrs.field(default=-math.inf, init=False)

    def __attrs_post_init__(self) -> None:
        self.books = Books(self.fleet)
        self.peers = Peers(self.fleet)
        self.waiting = WaitingRequests(self._balancer, self._group)
        self.view = View(
            now=-math.inf,
            rng=np.random.default_rng(self.seed),
            workers=self.fleet.workers,
            waiting=self.waiting,
            match=self._match,
            serving=self.serving,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Columns that the view shows must be those that the fleet writes.
        copy.deepcopy(self.fleet, memo)
        return super().__deepcopy__(memo)

    @property
    def balancer(self) -> QueueBalancer:
        """Orders the requests that wait; another one files them anew.

        It is asked from the next event on, a driver's tick at the latest.

        Raises:
            PolicyError: On assignment, if the new one is none, or cannot place
                what waits; the old one stays.
        """
        return self._balancer

    @balancer.setter
    def balancer(self, balancer: QueueBalancer) -> None:
        if not isinstance(balancer, QueueBalancer):
            raise PolicyError(f"{shown(balancer)} is no QueueBalancer")
        if balancer is self._balancer:
            return
        old = self.waiting
        self.waiting = self.view.waiting = old.successor(balancer, self.view)
        # Not before: the two may have a part in common, to which these wait on.
        old.dismiss(self.view)
        self._balancer = balancer

    def check(self, request: Request) -> None:
        """Raise InvalidRequest if *request* can never be served here."""
        id, model = request.id, request.model
        if id in self.waiting or id in self.books:
            raise DuplicateRequest(f"request id {id!r} is in use")
        longest = self.fleet.longest(model)
        if model and model not in self.models and longest is None:
            raise self.unknown(f"no worker serves model {model!r}")
        if request.lora and not self.fleet.knows(request.lora):
            raise UnknownAdapter(f"no worker has the adapter {request.lora!r}")
        tokens = request.prompt_tokens + (request.max_new_tokens or 1)
        if longest is not None and tokens > longest:
            raise PromptTooLong(
                f"{request.prompt_tokens} prompt tokens and"
                f" {request.max_new_tokens or 1} new ones make {tokens},"
                f" model {model!r} takes {longest}"
            )

    def unknown(self, why: str) -> UnknownModel:
        """Return the error for a model that is none of those served here."""
        known = ", ".join(sorted(self.models)) or "none"
        return UnknownModel(f"{why}; known: {known}")

    def expire(self, id: RequestId) -> list[c.Command]:
        """End a request whose deadline has passed."""
        entry = self.waiting.remove(id, self.view)
        if entry is not None:
            self.gone(entry.request)
            error = DeadlineExceeded(f"{id!r} waited too long")
            return [c.Fail(entry.request, error)]
        booking = self.books.get(id)
        assert booking is not None, "a deadline outlived its request"
        aborts = self.abort(booking)
        self.gone(booking.request)
        error = DeadlineExceeded(f"{id!r} ran past its deadline")
        return [*aborts, c.Fail(booking.request, error)]

    def bereave(self, worker: Worker) -> list[c.Command]:
        """Fail what only *worker*, which is gone, could serve; forget its models."""
        commands: list[c.Command] = []
        for request in [*self.waiting]:
            model, lora = request.model, request.lora
            tokens = request.prompt_tokens + (request.max_new_tokens or 1)
            awaited = model in self.welcome if model else bool(self.welcome)
            if awaited or not worker.serves(model, lora, tokens):
                continue
            if not self.fleet.may_serve(model, lora, tokens):
                self.waiting.remove(request.id, self.view)
                self.gone(request)
                error = f"{worker.id!r}, the last worker for {request.id!r}, was lost"
                commands.append(c.Fail(request, WorkerLost(error)))
        for model in worker.models - self.welcome:
            if not self.fleet.may_serve(model):
                self.models.discard(model)
        return commands

    def scale(self, at: float) -> list[c.Command]:
        """Ask the autoscaler; raises PolicyError with nothing changed."""
        if self.autoscaler is None:
            return []
        before = self.view.now
        self.view.advance(at)
        try:
            advised = self.autoscaler.recommendations(self.view)
        except Exception as error:
            self.view.advance(before)
            raise policy_error(self.autoscaler, error) from error
        changed = [
            advice
            for advice in advised
            if self.asked_workers.get(advice.pool) != advice.workers
        ]
        self.asked_workers |= {advice.pool: advice.workers for advice in changed}
        return [c.Scale(advice.workers, advice.pool, advice) for advice in changed]

    def opens_at(self) -> float:
        """Return when time alone may let somebody go; infinity for never.

        A driver that has nothing else to tell by then sends a `Tick`.
        """
        if not len(self.waiting):
            return math.inf
        return min(self._opens_at(self.view.now), self.waiting.next_alarm)

    def opened(self) -> bool:
        """Say whether time alone may have let somebody go by now."""
        if not len(self.waiting):
            return False
        now = self.view.now
        return self.waiting.next_alarm <= now or self._opens_at(self._looked_at) <= now

    def _opens_at(self, after: float) -> float:
        try:
            return self.balancer.opens_at(self.view, after)
        except Exception as error:
            self.waiting.faults.append(policy_error(self.balancer, error))
            return math.inf

    def dispatch(self, lane: LaneName | None = None) -> list[c.Command]:
        """Send on whatever can go, of one lane or of all."""
        if lane is None:
            self._looked_at = self.view.now
        return dispatch(self, lane)

    def charge(self, booking: Booking, tokens: int) -> list[c.Command]:
        """Tell the balancer of generated tokens; if it fails, so does the request."""
        self.view.totals.generated_tokens += tokens
        request = booking.request
        try:
            self.balancer.generated(booking, tokens, self.view)
            self.waiting.touch(self.balancer.flow(request))
        except Exception as error:
            aborts = self.abort(booking)
            self.gone(request)
            return [*aborts, c.Fail(request, policy_error(self.balancer, error))]
        booking.last_token_at = self.view.now
        return []

    def retry(self, booking: Booking, worker: WorkerId, error: LlmdError) -> c.Command:
        """Queue what failed on *worker* if its client cannot tell, else fail it."""
        self.release(booking)
        booking.failed_on |= {worker}
        attempts = booking.attempts + 1
        lost = booking.streamed and not booking.request.resumable
        if lost or attempts >= self.max_attempts:
            self.gone(booking.request)
            return c.Fail(booking.request, error)
        return self.requeue(booking, attempts)

    def requeue(self, booking: Booking, attempts: int) -> c.Command:
        """Let a request whose booking has ended wait again, where it stood."""
        request = booking.request
        try:
            self.waiting.push(
                request,
                self.view,
                booking.since,
                attempts,
                again=True,
                failed_on=booking.failed_on,
                generated_tokens=booking.generated_tokens,
                number=booking.number,
            )
        except LlmdError as failure:
            self.gone(request)
            return c.Fail(request, failure)
        return c.Requeue(request)

    def abort(self, booking: Booking) -> list[c.Command]:
        """Stop a booked request wherever it runs."""
        aborts = [c.Abort(worker, booking.request.id) for worker in booking.workers]
        self.release(booking)
        return [*aborts]

    def release(self, booking: Booking) -> None:
        """End a booking, whatever came of it."""
        self.books.release(booking)
        self.settle(booking)

    def settle(self, booking: Booking) -> None:
        """Tell the policies that a booking is over."""
        if not booking.streamed:
            for worker in booking.workers:
                self.index.revoke(worker, booking.request, self.view.now)
        self.waiting.tell(self.balancer.ended, booking, self.view)
        self.waiting.tell(self._touch, booking.request)

    def _touch(self, request: Request) -> None:
        self.waiting.touch(self.balancer.flow(request))

    def gone(self, request: Request) -> None:
        """Forget a request that is in no place any more."""
        if request.deadline < math.inf:
            self.deadlines.discard((request.deadline, request.id))

    def judge(self, booking: Booking, worker: WorkerId, error: str | None) -> None:
        """Tell the router how a dispatch ended; what it raises blames no request."""
        try:
            self.router.ended(booking.request, worker, error, self.view)
        except Exception as failure:
            self.waiting.faults.append(policy_error(self.router, failure))

    def refresh(self) -> list[c.Command]:
        """Show policies the changed fleet and see what it makes possible."""
        self.view.workers = self.fleet.workers
        commands: list[c.Command] = []
        if self.fleet.limits != self._limits:
            self._limits = self.fleet.limits
            anew, casualties = self.waiting.refiled(self.view)
            self.waiting = self.view.waiting = anew
            for request, error in casualties:
                self.gone(request)
                commands.append(c.Fail(request, error))
        return [*commands, *self.dispatch()]

    def _group(self, request: Request) -> tuple[Hashable, ...]:
        """Return what keeps requests apart: who can serve them differs."""
        tokens = request.prompt_tokens + (request.max_new_tokens or 1)
        return request.model, request.lora, self.fleet.fit(tokens)

    def serving(self, request: Request) -> Mask:
        """Say which workers can serve *request* now, shape (W,)."""
        tokens = request.prompt_tokens + (request.max_new_tokens or 1)
        return self.fleet.serving(request.model, request.lora, tokens)

    def _match(self, request: Request, workers: Any, at: float) -> Any:
        return self.index.match(request, workers, at)
