"""A driver in real time: carries out a cluster's commands on engines."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any

import attrs

from .. import commands as c
from .. import events as e
from ..cluster import Cluster
from ..errors import LlmdError, PolicyError, UnknownWorker, WorkerLost
from ..types import Request, RequestId, State, Worker, WorkerId
from .alarm import Alarm
from .attempt import attempt
from .engine import Engine, Output, Report
from .lease import Lease
from .ticket import Ticket

_log = logging.getLogger("llmd.live")
_ERRAND_S = 30.0
"""Seconds that what nobody waits for, or should not for long, may take."""
_QUIET_S = 60.0
"""Seconds in which a policy that fails in one way again is not logged again."""


@attrs.define(eq=False)
class Server:
    """Routes requests to engines of one event loop; use as a context manager.

        async with Server(Cluster()) as server:
            await server.add(VllmEngine("model"))
            async for output in server.generate(request):
                print(output.text, end="")

    Attributes:
        cluster: Decides; its policies may be replaced at any time.
        clock: Seconds, never backwards; the loop's own clock if not given.
        tick: Seconds between looks at deadlines and the autoscaler; who may go at a
            time that the balancer tells goes then.
        prefill_timeout: Seconds a prefill on another worker may take before
            the decode worker computes the prompt itself.
        scale: Called with what the autoscaler wants; `EnginePool` sets it.
        counts: What went wrong and was made good, by name.
    """

    cluster: Cluster = attrs.field(factory=Cluster)
    clock: Callable[[], float] = lambda: asyncio.get_running_loop().time()
    tick: float = 0.1
    prefill_timeout: float = 30.0
    scale: Callable[[c.Scale], None] | None = None
    counts: Counter[str] = attrs.field(factory=Counter, init=False)
    _engines: dict[WorkerId, Engine] = attrs.field(factory=dict, init=False)
    _watchers: dict[WorkerId, asyncio.Task[None]] = attrs.field(
        factory=dict, init=False
    )
    _tickets: dict[RequestId, Ticket] = attrs.field(factory=dict, init=False)
    _errands: set[asyncio.Task[Any]] = attrs.field(factory=set, init=False)
    _ticker: asyncio.Task[None] | None = attrs.field(default=None, init=False)
    _alarm: Alarm = attrs.field(init=False)
    _names: Any = attrs.field(factory=itertools.count, init=False)
    _unheard: set[str] = attrs.field(factory=set, init=False)
    _quiet: dict[str, float] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._alarm = Alarm(self._look)

    # Workers -------------------------------------------------------------

    async def add(
        self, engine: Engine, worker: WorkerId = "", expected: Worker | None = None
    ) -> WorkerId:
        """Start *engine*, let it join when it is ready, and return its id.

        While it starts, the cluster already counts it as supply.

        Args:
            engine: To start.
            worker: Its id; made up if not given.
            expected: What it will probably say of itself, for policies that
                count starting workers by role or machine; its machine is kept if
                the engine names none.

        Raises:
            EngineError: It did not start; the fleet is as before.
        """
        worker = worker or f"worker-{next(self._names)}"
        expected = expected or Worker(id=worker)
        starting = attrs.evolve(expected, id=worker, state=State.STARTING)
        self.handle(e.WorkerJoined(self.clock(), starting))
        self._engines[worker] = engine

        def progress(state: State) -> None:
            self.handle(e.WorkerChanged(self.clock(), worker, state=state))

        try:
            facts = await engine.start(worker, self._report, progress)
        except BaseException:
            self._drop(worker)
            # One that hung in its start may do so here as well.
            await _bounded(engine.stop())
            raise
        # One that shares its GPU may begin asleep.
        asleep = facts.state is State.SLEEPING
        state = State.SLEEPING if asleep else State.READY
        # Engines do not know what their machine is called.
        machine = facts.machine or expected.machine
        facts = attrs.evolve(facts, id=worker, state=state, machine=machine)
        self.handle(e.WorkerChanged(self.clock(), worker, facts=facts))
        self._watchers[worker] = asyncio.create_task(self._watch(worker, engine))
        return worker

    async def remove(self, worker: WorkerId, drain_timeout: float = 60.0) -> None:
        """Let *worker* finish what it runs, then stop it.

        What still runs after *drain_timeout* seconds goes on elsewhere if its
        client has seen nothing of it yet, and fails otherwise.

        Raises:
            UnknownWorker: It is not there.
        """
        engine = self.engine(worker)
        self.handle(e.WorkerChanged(self.clock(), worker, state=State.DRAINING))
        deadline = self.clock() + drain_timeout
        while self.cluster.books.on(worker) and self.clock() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        self._drop(worker)
        await engine.stop()

    def engine(self, worker: WorkerId) -> Engine:
        """Return a worker's engine.

        Raises:
            UnknownWorker: It is not there.
        """
        engine = self._engines.get(worker)
        if engine is None:
            raise UnknownWorker(f"no worker {worker!r}")
        return engine

    @property
    def engines(self) -> Mapping[WorkerId, Engine]:
        """The engines by worker, starting ones too."""
        return self._engines

    def add_model(self, model: str) -> None:
        """Welcome requests for *model* before any worker serves it."""
        self.handle(e.ModelAdded(self.clock(), model))

    def remove_model(self, model: str) -> None:
        """Refuse requests for *model* from now on, and those that wait."""
        self.handle(e.ModelRemoved(self.clock(), model))

    # Requests ------------------------------------------------------------

    async def generate(
        self, request: Request, sampling: Mapping[str, Any] | None = None
    ) -> AsyncGenerator[Output, None]:
        """Yield the answer to *request* in pieces.

        Closing the iterator, or cancelling its task, cancels the request.

        Args:
            request: What to answer.
            sampling: OpenAI names, as in `Call.sampling`.

        Raises:
            LlmdError: Why there is no answer, or no more of it.
        """
        ticket = self.enter(request)
        try:
            while not ticket.ended:
                await ticket.placed()
                run = attempt(self, ticket, sampling or {})
                async with contextlib.aclosing(run) as outputs:
                    async for output in outputs:
                        yield output
            if ticket.failure is not None:
                raise ticket.failure
        finally:
            self.leave(ticket)

    def lease(self, request: Request) -> Lease:
        """Book load for a request that the caller sends to the engine itself."""
        return Lease(request, self)

    def enter(self, request: Request, retried: bool = True) -> Ticket:
        """Let *request* arrive; the caller must `leave` with the ticket.

        Args:
            request: What arrives.
            retried: Whether a request that lost its worker waits for another.

        Raises:
            LlmdError: It cannot be served or was refused; nothing is booked.
        """
        ticket = Ticket(request, retried=retried)
        other = self._tickets.get(request.id)
        self._tickets[request.id] = ticket
        try:
            self.handle(e.RequestArrived(self.clock(), request))
        except BaseException:
            if other is None:
                del self._tickets[request.id]
            else:
                self._tickets[request.id] = other
            raise
        return ticket

    def end(self, ticket: Ticket, error: str | None = None) -> None:
        """Let a dispatched request end."""
        if not ticket.ended and ticket.decision is not None:
            worker, id = ticket.decision.decode, ticket.request.id
            if error is None:
                ticket.ended = True
            self.handle(e.RequestEnded(self.clock(), worker, id, error))

    def leave(self, ticket: Ticket) -> None:
        """Forget a request; one that has not ended is cancelled."""
        if not ticket.ended:
            ticket.ended = True
            self.handle(e.RequestCancelled(self.clock(), ticket.request.id))
        if self._tickets.get(ticket.request.id) is ticket:
            del self._tickets[ticket.request.id]

    def handle(self, event: e.Event) -> None:
        """Feed the cluster and carry out what it commands."""
        for command in self.cluster.handle(event):
            self._carry_out(command)
        self._alarm.set(self.cluster.opens_at(), self.clock())

    def lost(self, worker: WorkerId, reason: str) -> None:
        """Take out a worker whose engine is dead."""
        engine = self._engines.get(worker)
        if engine is not None:
            _log.warning("worker %s is lost: %s", worker, reason)
            self.counts["workers_lost"] += 1
            scaled = self.cluster.autoscaler is not None or self.scale is not None
            self._drop(worker, replaced=scaled or engine.replaced)
            self._errand(engine.stop())

    def unheard(self, scale: c.Scale) -> None:
        """Note that nobody has engines for a pool; a warning tells of each once."""
        self.counts["unheard_scales"] += 1
        if scale.pool not in self._unheard:
            self._unheard.add(scale.pool)
            want, pool = scale.workers, scale.pool
            _log.warning("nobody starts the %d engines of the pool %r", want, pool)

    async def __aenter__(self) -> Server:
        self._ticker = asyncio.create_task(self._tick())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Fail what is in flight, stop all engines; idempotent."""
        for ticket in list(self._tickets.values()):
            if not ticket.ended:
                self.handle(e.RequestCancelled(self.clock(), ticket.request.id))
                ticket.fail(WorkerLost("the server was closed"))
        engines = list(self._engines.items())
        for worker, _ in engines:
            self._drop(worker)
        stops = [engine.stop() for _, engine in engines]
        for result in await asyncio.gather(*stops, return_exceptions=True):
            if isinstance(result, Exception):
                _log.error("an engine did not stop well", exc_info=result)
        self._alarm.stop()
        tasks = [*self._errands, *([self._ticker] if self._ticker else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Inside --------------------------------------------------------------

    def _carry_out(self, command: c.Command) -> None:
        match command:
            case c.Dispatch(request=request, decision=decision):
                if ticket := self._tickets.get(request.id):
                    ticket.dispatch(decision)
            case c.Requeue(request=request):
                self.counts["requeued"] += 1
                if ticket := self._tickets.get(request.id):
                    self._requeue(ticket)
            case c.Fail(request=request, error=error):
                if ticket := self._tickets.get(request.id):
                    ticket.fail(error)
            case c.Abort(worker=worker, request_id=id):
                if engine := self._engines.get(worker):
                    self._errand(engine.abort(id))
            case c.Scale():
                (self.scale or self.unheard)(command)

    def _requeue(self, ticket: Ticket) -> None:
        if ticket.retried and ticket.said is not None:
            ticket.requeue()
        else:
            worker = ticket.decision.decode if ticket.decision else "a worker"
            self._errand(self._give_up(ticket, WorkerLost(f"{worker} was lost")))

    async def _give_up(self, ticket: Ticket, error: LlmdError) -> None:
        # A task, since a cluster must not be fed while its commands are read.
        self.leave(ticket)
        ticket.fail(error)

    def _drop(self, worker: WorkerId, replaced: bool = True) -> None:
        """Take a worker out of the fleet; its engine is the caller's to stop."""
        self._engines.pop(worker, None)
        watcher = self._watchers.pop(worker, None)
        if watcher is not None and watcher is not asyncio.current_task():
            watcher.cancel()
        self.handle(e.WorkerLeft(self.clock(), worker, replaced))

    def _report(self, event: Report) -> None:
        now = self.cluster.view.now
        if event.at < now:
            event = attrs.evolve(event, at=now)
        self.handle(event)

    def _errand(self, work: Coroutine[Any, Any, None]) -> None:
        """Run *work* beside everything else, for a while at most."""
        task = asyncio.create_task(_bounded(work))
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def _watch(self, worker: WorkerId, engine: Engine) -> None:
        self.lost(worker, await engine.died())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self.tick)
            self._look(self.clock())

    def _look(self, at: float) -> None:
        """Let the cluster see that it is *at* a time, or later."""
        try:
            self.handle(e.Tick(max(at, self.clock())))
        except Exception as error:
            # Whatever it is, deadlines must go on being kept.
            self.counts["policy_errors"] += 1
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        """Log *error*, one of a kind a minute: a tick comes ten times a second."""
        kind, now = type(error).__name__, self.clock()
        if isinstance(error, PolicyError):
            kind = error.brief
        if now >= self._quiet.get(kind, now):
            self._quiet[kind] = now + _QUIET_S
            _log.error("a policy failed on a tick", exc_info=error)


async def _bounded(work: Coroutine[Any, Any, None]) -> None:
    try:
        async with asyncio.timeout(_ERRAND_S):
            await work
    except Exception:
        _log.exception("an errand failed")
