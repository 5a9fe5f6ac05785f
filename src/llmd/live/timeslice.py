"""One real GPU that several engines share by turns."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any

import attrs

from ..cluster import Cluster
from ..errors import EngineError, InvalidEvent, InvalidSlice
from ..machines import Machine
from ..timeslice import (
    Action,
    Asked,
    Blame,
    Complain,
    Do,
    Done,
    Failed,
    GpuArbiter,
    GpuCommand,
    GpuEvent,
    Infeasible,
    Joined,
    Left,
    Lost,
    Sharer,
    Wanted,
)
from ..types import Request, RequestId, State, Worker, WorkerId
from .engine import Call, Engine, Output, Report
from .sleepers import Sleepers
from .sliceable import Sleeper, Sliceable

_log = logging.getLogger("llmd.live")


@attrs.define(eq=False)
class SharedGpu:
    """Lets the engines of one GPU take turns; use as a context manager.

        async with SharedGpu(GpuArbiter(QuantumScheduler())) as gpu:
            chat = gpu.share(VllmEngine("chat"), Sharer(engine="chat", weight=2.0))
            bulk = gpu.share(VllmEngine("bulk"), Sharer(engine="bulk"))
            await server.add(chat)
            await server.add(bulk)
            gpu.follow(server.cluster)

    Attributes:
        arbiter: Decides; its policy may be replaced at any time.
        complain: Called with what this GPU cannot do; None: all is well again.
        replaced: Somebody adds another engine for one that is lost, so what
            only that one could serve waits.  If not, it fails with
            `WorkerLost` and the model is unknown from then on, unless there is
            an autoscaler or a pool, or `Server.add_model` welcomed it.
        complaint: The last of these.
        counts: What went wrong, by name.
    """

    arbiter: GpuArbiter
    complain: Callable[[Infeasible | None], None] | None = None
    replaced: bool = False
    complaint: Infeasible | None = attrs.field(default=None, init=False)
    counts: Counter[str] = attrs.field(factory=Counter, init=False)
    _engines: dict[str, SharedEngine] = attrs.field(factory=dict, init=False)
    _tasks: set[asyncio.Task[None]] = attrs.field(factory=set, init=False)
    _alarm: asyncio.TimerHandle | None = attrs.field(default=None, init=False)
    _closed: bool = attrs.field(default=False, init=False)
    _followed: Sleepers | None = attrs.field(default=None, init=False)

    def share(
        self,
        engine: Engine,
        sharer: Sharer,
        *,
        machine: Machine | None = None,
        first_token_s: float = math.inf,
        starts_asleep: bool = False,
    ) -> SharedEngine:
        """Return *engine* as one that takes turns; start and use that one.

        Args:
            engine: What runs; also `Sliceable`, and `Sleeper` if memory is short.
            sharer: Its name, weight and sizes.
            machine: Its step times, to know how early a prompt must begin.
            first_token_s: How soon after its arrival a request wants an answer.
            starts_asleep: Put it to sleep once started, for want of memory.

        Raises:
            InvalidSlice: The name is taken, or the engine cannot do it.
        """
        if sharer.engine in self._engines:
            raise InvalidSlice(f"an engine named {sharer.engine!r} shares this GPU")
        needed = Sleeper if starts_asleep else Sliceable
        if not isinstance(engine, needed):
            raise InvalidSlice(f"{engine!r} cannot do what {needed.__name__} asks")
        shared = SharedEngine(
            engine, sharer, self, machine or Machine(), first_token_s, starts_asleep
        )
        self._engines[sharer.engine] = shared
        return shared

    def follow(self, cluster: Cluster) -> None:
        """Let requests for engines that sleep wait in *cluster*, as their demand.

        Without this, they wait in the queue of the engine that sleeps, where
        the balancer's order binds no more.  To be called once.
        """
        self._followed = Sleepers(cluster, lambda: [*self._engines.values()])
        for shared in self._engines.values():
            shared.show()

    @property
    def followed(self) -> bool:
        """Whether requests wait in a cluster."""
        return self._followed is not None

    def tell(self, event: Callable[[float], GpuEvent]) -> None:
        """Feed the arbiter with an event of now, and carry out what it says.

        Raises:
            InvalidEvent: An engine joins that is there already, or has no room.
        """
        if self._closed:
            return
        now = max(asyncio.get_running_loop().time(), self.arbiter.now)
        commands = self.arbiter.handle(event(now))
        self._set_alarm()
        for command in commands:
            self._carry_out(command)

    def shielded(self, hook: Callable[..., object], *about: Any) -> None:
        """Call what others gave; if it fails, that costs no engine anything."""
        try:
            hook(*about)
        except Exception:
            _log.exception("%r failed", hook)
            self.counts["hook_errors"] += 1

    async def __aenter__(self) -> SharedGpu:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop deciding and let every engine go on; idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._alarm is not None:
            self._alarm.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for shared in self._engines.values():
            with contextlib.suppress(Exception):
                async with asyncio.timeout(5.0):
                    await shared.engine.resume()

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self.arbiter.alarm < math.inf:
            loop = asyncio.get_running_loop()
            self._alarm = loop.call_at(self.arbiter.alarm, self.tell, Asked)

    def _carry_out(self, command: GpuCommand) -> None:
        match command:
            case Do(engine=engine, action=action):
                # A hook called for the command before may have taken it out.
                if shared := self._engines.get(engine):
                    self._run(self._do(shared, action))
            case Lost(engine=engine, reason=reason):
                _log.warning("engine %s is lost: %s", engine, reason)
                self.counts["engines_lost"] += 1
                if shared := self._engines.get(engine):
                    shared.lose(reason)
            case Complain(what=what):
                self.complaint = what
                if self.complain is not None:
                    self.shielded(self.complain, what)
            case Blame(error=error):
                _log.error("a time slice failed", exc_info=error)
                self.counts["policy_errors"] += 1

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _do(self, shared: SharedEngine, action: Action) -> None:
        name = shared.sharer.engine
        try:
            # The arbiter gives up at the same time; this only ends the call.
            async with asyncio.timeout(self.arbiter.timeout_s):
                await getattr(shared.engine, action.value)()
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            self.tell(lambda at: Failed(at, name, action, failure))
        else:
            shared.did(action)
            self.tell(lambda at: Done(at, name, action))

    def leave(self, name: str) -> None:
        """Take an engine out, whatever became of it."""
        if self._engines.pop(name, None) is not None:
            self.tell(lambda at: Left(at, name))


@attrs.define(eq=False)
class SharedEngine(Engine):
    """An engine that runs only in its turns; made by `SharedGpu.share`.

    Requests are taken at any time: the engine's own queue holds them while it
    is paused or asleep, and they count as its wish for the GPU.  Where the GPU
    follows a cluster, one that sleeps is shown as sleeping and gets none.
    """

    engine: Any
    sharer: Sharer
    gpu: SharedGpu
    machine: Machine
    first_token_s: float
    starts_asleep: bool
    _wanting: dict[RequestId, tuple[int, float]] = attrs.field(factory=dict, init=False)
    _due: dict[RequestId, float] = attrs.field(factory=dict, init=False)
    _lost: asyncio.Future[str] | None = attrs.field(default=None, init=False)
    _facts: Worker | None = attrs.field(default=None, init=False)
    _progress: Callable[[State], None] | None = attrs.field(default=None, init=False)
    _asleep: bool = attrs.field(default=False, init=False)

    async def start(
        self,
        worker: WorkerId,
        report: Callable[[Report], None],
        progress: Callable[[State], None],
    ) -> Worker:
        self._lost = asyncio.get_running_loop().create_future()
        facts: Worker = await self.engine.start(worker, report, progress)
        self._facts, self._progress = attrs.evolve(facts, id=worker), progress
        if self.starts_asleep:
            await self.engine.pause()
            await self.engine.sleep()
            self._asleep = True
            if self.gpu.followed:
                facts = attrs.evolve(facts, state=State.SLEEPING)
        try:
            self.gpu.tell(lambda at: Joined(at, self.sharer, self.starts_asleep))
        except InvalidEvent as error:
            await self.stop()
            raise EngineError(str(error)) from error
        return facts

    @property
    def replaced(self) -> bool:
        return self.gpu.replaced

    @property
    def worker(self) -> WorkerId:
        """Its id in the cluster; empty before it has started."""
        return "" if self._facts is None else self._facts.id

    def did(self, action: Action) -> None:
        """Note that the engine fell asleep or woke up."""
        if action in (Action.SLEEP, Action.WAKE):
            self._asleep = action is Action.SLEEP
            self.show()

    def show(self) -> None:
        """Tell the cluster that is followed whether this sleeps."""
        if self._progress is not None and self.gpu.followed:
            state = State.SLEEPING if self._asleep else State.READY
            self.gpu.shielded(self._progress, state)

    def could_serve(self, request: Request) -> bool:
        """Say whether it sleeps, and could serve *request* if it did not."""
        if self._facts is None or not self._asleep:
            return False
        tokens = request.prompt_tokens + (request.max_new_tokens or 1)
        return self._facts.serves(request.model, request.lora, tokens)

    def wish(self, request: Request) -> None:
        """Count a request that waits elsewhere as a wish for the GPU."""
        self._want(request)

    def unwish(self, id: RequestId) -> None:
        """Count it no more."""
        self._wanting.pop(id, None)
        self._due.pop(id, None)
        self._tell()

    async def generate(self, call: Call) -> AsyncIterator[Output]:
        request = call.request
        self._want(request)
        try:
            stream = self.engine.generate(call)
            try:
                async for output in stream:
                    if output.token_ids or output.text:
                        self._answered(request.id)
                    yield output
            finally:
                await stream.aclose()
        finally:
            self.unwish(request.id)

    async def abort(self, request_id: RequestId) -> None:
        await self.engine.abort(request_id)

    async def stop(self) -> None:
        self.gpu.leave(self.sharer.engine)
        await self.engine.stop()

    async def died(self) -> str:
        assert self._lost is not None, "an engine is watched before it was started"
        dying = asyncio.ensure_future(self.engine.died())
        try:
            await asyncio.wait((dying, self._lost), return_when=asyncio.FIRST_COMPLETED)
            reason = dying.result() if dying.done() else self._lost.result()
        finally:
            dying.cancel()
        self.gpu.leave(self.sharer.engine)
        return str(reason)

    async def tokenize(self, text: str) -> list[int]:
        tokens: list[int] = await self.engine.tokenize(text)
        return tokens

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> list[int]:
        tokens: list[int] = await self.engine.chat(
            messages, tools=tools, template=template
        )
        return tokens

    def lose(self, reason: str) -> None:
        """Let whoever watches it know that it is of no use any more."""
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(reason)

    def _want(self, request: Request) -> None:
        now = asyncio.get_running_loop().time()
        due = min(request.deadline, now + self.first_token_s)
        if due < math.inf:
            self._due[request.id] = due - self.machine.prefill_s(
                float(request.prompt_tokens)
            )
        self._wanting[request.id] = (request.priority, now)
        self._tell()

    def _answered(self, request_id: RequestId) -> None:
        if self._due.pop(request_id, None) is not None:
            self._tell()

    def _tell(self) -> None:
        name = self.sharer.engine
        band = min((wish[0] for wish in self._wanting.values()), default=0)
        deadline = min(self._due.values(), default=math.inf)
        count = len(self._wanting)
        self.gpu.tell(lambda at: Wanted(at, name, count, band=band, deadline=deadline))
