"""One shared GPU in virtual time: the arbiter of a live GPU, on modelled engines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
from sortedcontainers import SortedList

from ..errors import InvalidSlice
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
    TurnTaken,
    Wanted,
)
from .agenda import Agenda


@attrs.frozen(kw_only=True)
class Job:
    """A request, as a modelled engine needs it.

    Attributes:
        arrived_at: When it came.
        prompt_tokens: To compute before its first token.
        new_tokens: To generate, at least 1.
        priority: Smaller is more urgent.
        deadline: When its first token is due.
    """

    arrived_at: float
    prompt_tokens: int = 512
    new_tokens: int = 64
    priority: int = 0
    deadline: float = math.inf


@attrs.define(eq=False)
class _Running:
    job: Job
    left_tokens: int


@attrs.define(eq=False)
class GpuWorker:
    """A modelled engine: whole prompts one a step, beside a batch of decodes.

    Attributes:
        sharer: As it joins the arbiter; its costs are what switches really take.
        machine: Its step times.
        jobs: To come, in order of arrival.
        max_running: Requests in a batch.
        ttft_s: Of each request that got its first token.
        tokens: Generated.
        busy_s: Spent in steps.
        ended: Requests answered in full.
    """

    sharer: Sharer
    machine: Machine = attrs.field(factory=Machine)
    jobs: Iterable[Job] = ()
    max_running: int = 256

    ttft_s: list[float] = attrs.field(factory=list, init=False)
    tokens: int = attrs.field(default=0, init=False)
    busy_s: float = attrs.field(default=0.0, init=False)
    ended: int = attrs.field(default=0, init=False)
    _waiting: Any = attrs.field(factory=SortedList, init=False)
    _due: Any = attrs.field(factory=SortedList, init=False)
    _arrivals: Any = attrs.field(factory=itertools.count, init=False)
    _batch: list[_Running] = attrs.field(factory=list, init=False)
    _prefill: Job | None = attrs.field(default=None, init=False)
    _context_tokens: int = attrs.field(default=0, init=False)

    @property
    def name(self) -> str:
        """Of the engine."""
        return self.sharer.engine

    def arrive(self, job: Job) -> None:
        """Take a request in."""
        self._waiting.add((job.priority, next(self._arrivals), job))
        if job.deadline < math.inf:
            self._due.add(self._begin_by(job))

    def wanted(self, at: float) -> Wanted:
        """Say what it wants of the GPU."""
        bands = [running.job.priority for running in self._batch]
        if self._waiting:
            bands.append(self._waiting[0][0])
        if self._prefill is not None:
            bands.append(self._prefill.priority)
        return Wanted(
            at,
            self.name,
            requests=len(bands) + max(len(self._waiting) - 1, 0),
            band=min(bands, default=0),
            deadline=self._due[0] if self._due else math.inf,
        )

    def _begin_by(self, job: Job) -> float:
        return job.deadline - self.machine.prefill_s(float(job.prompt_tokens))

    def begin_step(self) -> float | None:
        """Return the seconds of the next step; None if there is nothing to do."""
        if self._waiting and len(self._batch) < self.max_running:
            # The most urgent first, as vLLM's priority policy does.
            self._prefill = self._waiting.pop(0)[2]
        if self._prefill is None and not self._batch:
            return None
        prompt = self._prefill.prompt_tokens if self._prefill else 0
        return self.machine.step_s(prompt, 0, len(self._batch), self._context_tokens)

    def end_step(self, at: float, took_s: float) -> None:
        """Count what the step did."""
        self.busy_s += took_s
        self.tokens += len(self._batch)
        self._context_tokens += len(self._batch)
        for running in self._batch:
            running.left_tokens -= 1
        if self._prefill is not None:
            job, self._prefill = self._prefill, None
            if job.deadline < math.inf:
                self._due.remove(self._begin_by(job))
            self.ttft_s.append(at - job.arrived_at)
            self.tokens += 1
            self._batch.append(_Running(job, job.new_tokens - 1))
            self._context_tokens += job.prompt_tokens + 1
        over = [running.job for running in self._batch if running.left_tokens <= 0]
        if over:
            self.ended += len(over)
            self._batch = [run for run in self._batch if run.left_tokens > 0]
            for job in over:
                self._context_tokens -= job.prompt_tokens + job.new_tokens


@attrs.frozen(kw_only=True)
class GpuReport:
    """What came of a run.

    Attributes:
        seconds: Simulated.
        busy_s: Spent in steps, by engine.
        ttft_s: Times to first token, by engine.
        tokens: Generated, by engine.
        turns: In order.
        lost: Engines given up, and why.
        complaints: In order; None where a complaint ended.
    """

    seconds: float
    busy_s: Mapping[str, float]
    ttft_s: Mapping[str, Sequence[float]]
    tokens: Mapping[str, int]
    turns: Sequence[TurnTaken]
    lost: Mapping[str, str]
    complaints: Sequence[Infeasible | None]

    @property
    def utilisation(self) -> float:
        """Part of the time spent in steps, in [0, 1]."""
        return sum(self.busy_s.values()) / self.seconds

    def shares(self) -> dict[str, float]:
        """Return each engine's part of the time spent in steps."""
        total = sum(self.busy_s.values()) or 1.0
        return {engine: busy / total for engine, busy in self.busy_s.items()}

    def gaps(self, engine: str) -> list[float]:
        """Return the times from one turn of an engine to its next."""
        turns = [turn for turn in self.turns if turn.engine == engine]
        return [b.began_at - a.ended_at for a, b in itertools.pairwise(turns)]


@attrs.define(eq=False)
class SimGpu:
    """Drives an arbiter and modelled engines through virtual time.

    Attributes:
        arbiter: Decides.
        workers: The engines.
        crashes: When an engine dies, by name.
        broken: Actions that fail, by engine.
        stuck: Actions that never end, by engine.

    >>> from llmd.timeslice import QuantumScheduler
    >>> workers = [
    ...     GpuWorker(Sharer(engine=name), jobs=[Job(arrived_at=0.0)]) for name in "ab"
    ... ]
    >>> gpu = SimGpu(GpuArbiter(QuantumScheduler()), workers)
    >>> sum(gpu.run(until=5.0).tokens.values())
    128
    """

    arbiter: GpuArbiter
    workers: Sequence[GpuWorker]
    crashes: Mapping[str, float] = attrs.field(factory=dict)
    broken: Mapping[str, Action] = attrs.field(factory=dict)
    stuck: Mapping[str, Action] = attrs.field(factory=dict)

    now: float = attrs.field(default=0.0, init=False)
    _agenda: Agenda = attrs.field(factory=Agenda, init=False)
    _alive: dict[str, GpuWorker] = attrs.field(init=False)
    _free: set[str] = attrs.field(factory=set, init=False)
    _stepping: dict[str, float] = attrs.field(factory=dict, init=False)
    _alarm: float = attrs.field(default=math.inf, init=False)
    _lost: dict[str, str] = attrs.field(factory=dict, init=False)
    _complaints: list[Infeasible | None] = attrs.field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        self._alive = {worker.name: worker for worker in self.workers}
        if len(self._alive) < len(self.workers):
            raise InvalidSlice("two engines have one name")

    def run(self, until: float) -> GpuReport:
        """Simulate to *until* seconds and report.

        Raises:
            PolicyError: The policy broke its contract, which a server would
                report and survive.
            InvalidEvent: An engine has no room even asleep.
        """
        held_bytes = 0.0
        for worker in self.workers:
            held_bytes += worker.sharer.awake_bytes
            asleep = held_bytes > self.arbiter.memory_bytes
            if asleep:
                held_bytes -= worker.sharer.awake_bytes - worker.sharer.asleep_bytes
            self._tell(Joined(0.0, worker.sharer, asleep))
            jobs = iter(worker.jobs)
            self._next_job(worker, jobs)
        for engine, at in self.crashes.items():
            self._agenda.put(at, self._crash, engine)
        for at, action, argument in self._agenda.until(until):
            self.now = at
            action(argument)
        self.now = until
        return self._report()

    def _report(self) -> GpuReport:
        return GpuReport(
            seconds=self.now,
            busy_s={worker.name: worker.busy_s for worker in self.workers},
            ttft_s={worker.name: tuple(worker.ttft_s) for worker in self.workers},
            tokens={worker.name: worker.tokens for worker in self.workers},
            turns=tuple(self.arbiter.history),
            lost=dict(self._lost),
            complaints=tuple(self._complaints),
        )

    def _next_job(self, worker: GpuWorker, jobs: Any) -> None:
        job = next(jobs, None)
        if job is not None:
            at = max(job.arrived_at, self.now)
            self._agenda.put(at, self._come, (worker, job, jobs))

    def _come(self, arrival: tuple[GpuWorker, Job, Any]) -> None:
        worker, job, jobs = arrival
        self._next_job(worker, jobs)
        if worker.name in self._alive:
            worker.arrive(job)
            self._tell(worker.wanted(self.now))
            self._step(worker.name)

    def _tell(self, event: GpuEvent) -> None:
        for command in self.arbiter.handle(event):
            self._carry_out(command)
        alarm = self.arbiter.alarm
        if alarm < math.inf and alarm != self._alarm:
            self._alarm = alarm
            self._agenda.put(alarm, self._ring, alarm)

    def _ring(self, alarm: float) -> None:
        if self.arbiter.alarm == alarm:
            self._alarm = math.inf
            self._tell(Asked(self.now))

    def _carry_out(self, command: GpuCommand) -> None:
        match command:
            case Do(engine=engine, action=action):
                self._do(engine, action)
            case Lost(engine=engine, reason=reason):
                self._lost[engine] = reason
                self._agenda.put(self.now, self._crash, engine)
            case Complain(what=what):
                self._complaints.append(what)
            case Blame(error=error):
                raise error

    def _do(self, engine: str, action: Action) -> None:
        worker = self._alive.get(engine)
        if worker is None or self.stuck.get(engine) is action:
            return
        costs = {
            Action.PAUSE: worker.sharer.pause_s,
            Action.RESUME: worker.sharer.resume_s,
            Action.SLEEP: worker.sharer.sleep_s,
            Action.WAKE: worker.sharer.wake_s,
        }
        start = self.now
        if action is Action.PAUSE:
            self._free.discard(engine)
            start = self._stepping.get(engine, self.now)
        self._agenda.put(start + costs[action], self._did, (engine, action))

    def _did(self, done: tuple[str, Action]) -> None:
        engine, action = done
        if engine not in self._alive:
            return
        if self.broken.get(engine) is action:
            self._tell(Failed(self.now, engine, action, "it is broken"))
            return
        if action is Action.RESUME:
            self._free.add(engine)
        self._tell(Done(self.now, engine, action))
        self._step(engine)

    def _step(self, engine: str) -> None:
        """Begin a step if the engine is free to, and not in one."""
        if engine not in self._free or engine in self._stepping:
            return
        took = self._alive[engine].begin_step()
        if took is not None:
            self._stepping[engine] = self.now + took
            self._agenda.put(self.now + took, self._stepped, (engine, took))

    def _stepped(self, step: tuple[str, float]) -> None:
        engine, took_s = step
        self._stepping.pop(engine, None)
        worker = self._alive.get(engine)
        if worker is None:
            return
        ended = worker.ended
        first = len(worker.ttft_s)
        worker.end_step(self.now, took_s)
        if worker.ended > ended or len(worker.ttft_s) > first:
            self._tell(worker.wanted(self.now))
        self._step(engine)

    def _crash(self, engine: str) -> None:
        if self._alive.pop(engine, None) is not None:
            self._free.discard(engine)
            self._stepping.pop(engine, None)
            self._tell(Left(self.now, engine))
