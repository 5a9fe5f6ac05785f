"""Engines that come and go as an autoscaler says, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable
from types import TracebackType

import attrs

from .. import commands as c
from ..autoscaler.amounts import positive, seconds
from ..errors import InvalidPolicy, LlmdError
from ..types import State, Worker, WorkerId
from .engine import Engine
from .server import Server

_log = logging.getLogger("llmd.live")


@attrs.define
class _Member:
    """One engine of a pool, and the task that moves it."""

    task: asyncio.Task[None]
    leaving: bool = False
    ready_at: float = math.nan

    @property
    def ready(self) -> bool:
        """Whether it ever got ready."""
        return not math.isnan(self.ready_at)


@attrs.define(eq=False)
class EnginePool:
    """Keeps as many engines as the autoscaler of a server's cluster wants.

    Engines are started beside each other and get traffic when they are warm.
    Those that start are the first to go, then those with the least to do; they
    finish what they run before they stop.  One that fails to start, or dies,
    is replaced after a pause that doubles each time, so that a broken engine
    costs little and the count never oscillates.  With no worker left, requests
    wait in the balancer, and the next tick wakes the fleet.

        async with Server(Cluster(autoscaler=policy)) as server:
            async with EnginePool(server, lambda: VllmEngine("model")):
                ...

    Attributes:
        server: Whose engines they are.
        make: Makes an engine, not started.
        name: The autoscaler's name for the pool; empty without pools.
        models: Names that are welcome even while no engine is there.
        expected: What an engine will say of itself, for policies that count
            starting ones.
        start_timeout: Seconds an engine may take to start; one that takes longer
            is stopped, and counts as failed; longer than the largest model
            takes to load.
        drain_timeout: Seconds an engine may take to finish before it stops.
        pause: Seconds before a failed start is tried again, at first.
        longest_pause: Seconds that pause may grow to.
        wanted: Engines asked for.
        failures: Why the last few engines failed, newest last.

    Raises:
        InvalidPolicy: A number of seconds is negative or no number.
    """

    server: Server
    make: Callable[[], Engine]
    name: str = ""
    models: tuple[str, ...] = ()
    expected: Worker | None = None
    start_timeout: float = attrs.field(default=1800.0, validator=positive)
    drain_timeout: float = attrs.field(default=60.0, validator=seconds)
    pause: float = attrs.field(default=1.0, validator=seconds)
    longest_pause: float = attrs.field(default=60.0, validator=seconds)
    wanted: int = attrs.field(default=0, init=False)
    failures: deque[str] = attrs.field(factory=lambda: deque(maxlen=20), init=False)
    _members: dict[WorkerId, _Member] = attrs.field(factory=dict, init=False)
    _failed: int = attrs.field(default=0, init=False)
    _deaths: int = attrs.field(default=0, init=False)
    _not_before: float = attrs.field(default=0.0, init=False)
    _made: int = attrs.field(default=0, init=False)
    _changed: asyncio.Event = attrs.field(factory=asyncio.Event, init=False)
    _keeper: asyncio.Task[None] | None = attrs.field(default=None, init=False)
    _others: Callable[[c.Scale], None] | None = attrs.field(default=None, init=False)

    def obey(self, scale: c.Scale) -> None:
        """Have as many engines as *scale* says, if it is about this pool."""
        if scale.pool == self.name:
            self.want(scale.workers)
        else:
            (self._others or self.server.unheard)(scale)

    def want(self, engines: int) -> None:
        """Have so many engines; they come and go in the background.

        Raises:
            InvalidPolicy: It is negative, or no whole number.
        """
        if not isinstance(engines, int) or engines < 0:
            raise InvalidPolicy(f"{engines!r} engines cannot be had")
        self.wanted = engines
        self._changed.set()

    @property
    def workers(self) -> tuple[WorkerId, ...]:
        """Engines that are starting or ready."""
        return tuple([id for id, member in self._members.items() if not member.leaving])

    async def __aenter__(self) -> EnginePool:
        """Begin, with what the autoscaler asked for so far.

        Raises:
            InvalidPolicy: Another pool of this name is kept for the server.
        """
        other = self.server.scale
        while isinstance(pool := getattr(other, "__self__", None), EnginePool):
            if pool.name == self.name:
                raise InvalidPolicy(f"there are two pools called {self.name!r}")
            other = pool._others
        for model in self.models:
            self.server.add_model(model)
        self._others, self.server.scale = self.server.scale, self.obey
        # A cluster says only what changes, and may have said it to nobody.
        self.want(self.server.cluster.asked_workers.get(self.name, self.wanted))
        self._keeper = asyncio.create_task(self._keep())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.server.scale = self._others
        tasks = [member.task for member in self._members.values()]
        if self._keeper is not None:
            tasks.append(self._keeper)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in [*self._members]:
            if worker in self.server.engines:
                with contextlib.suppress(LlmdError):
                    await self.server.remove(worker, drain_timeout=0.0)
        self._members.clear()

    # Inside --------------------------------------------------------------

    async def _keep(self) -> None:
        while True:
            self._bury()
            self._fill()
            self._thin()
            self._changed.clear()
            # A dead engine tells nobody here, so look now and then.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience()):
                    await self._changed.wait()

    def _patience(self) -> float:
        pause = self._not_before - self.server.clock()
        return min(max(pause, 0.01), 0.2) if pause > 0 else 0.2

    def _bury(self) -> None:
        """Forget engines that the server lost."""
        for worker, member in [*self._members.items()]:
            if member.ready and not member.leaving and worker not in self._there():
                del self._members[worker]
                # One that lived is no sign that the next one will not.
                lived = self.server.clock() - member.ready_at
                self._deaths = 0 if lived > self.longest_pause else self._deaths + 1
                self._failed = max(self._failed, self._deaths - 1)
                self._fail(f"{worker} was lost")

    def _fill(self) -> None:
        if self.server.clock() < self._not_before:
            return
        # After a failure one engine tries alone.
        missing = self.wanted - len(self.workers)
        for _ in range(min(missing, 1) if self._failed else missing):
            worker = f"{self.name or 'engine'}-{self._made}"
            self._made += 1
            task = asyncio.create_task(self._start(worker))
            self._members[worker] = _Member(task)

    def _thin(self) -> None:
        surplus = len(self.workers) - self.wanted
        if surplus <= 0:
            return
        view = self.server.cluster.view.workers
        load = dict(zip(view.ids, view.running_requests.tolist(), strict=True))
        order = [*self.workers]
        # Equal ones leave newest first, so that the warmest caches stay.
        order.reverse()
        order.sort(key=lambda id: (self._members[id].ready, load.get(id, 0)))
        for worker in order[:surplus]:
            member = self._members[worker]
            member.leaving = True
            if member.ready:
                member.task = asyncio.create_task(self._drain(worker))
            else:
                member.task.cancel()

    async def _start(self, worker: WorkerId) -> None:
        try:
            async with asyncio.timeout(self.start_timeout) as limit:
                await self.server.add(self.make(), worker, self.expected)
        except asyncio.CancelledError:
            self._members.pop(worker, None)
            raise
        except Exception as error:
            self._members.pop(worker, None)
            late = f"not within {self.start_timeout:g} s"
            why = late if limit.expired() else error
            self._fail(f"{worker} did not start: {why}")
        else:
            self._members[worker].ready_at = self.server.clock()
            self._failed = 0
        finally:
            self._changed.set()

    async def _drain(self, worker: WorkerId) -> None:
        try:
            await self.server.remove(worker, self.drain_timeout)
        except LlmdError as error:
            _log.warning("worker %s did not leave in order: %s", worker, error)
        finally:
            self._members.pop(worker, None)
            self._changed.set()

    def _fail(self, why: str) -> None:
        self.failures.append(why)
        self.server.counts["engine_failures"] += 1
        pause = min(self.pause * 2.0**self._failed, self.longest_pause)
        self._failed += 1
        self._not_before = self.server.clock() + pause
        _log.warning("%s; the next one is tried in %.3g s", why, pause)

    def _there(self) -> set[WorkerId]:
        states = zip(
            self.server.cluster.view.workers.ids,
            self.server.cluster.view.workers.states,
            strict=True,
        )
        return {worker for worker, state in states if state is not State.DRAINING}
