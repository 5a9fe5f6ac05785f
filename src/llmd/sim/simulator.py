"""The driver in virtual time: the unchanged `Cluster` on model workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import attrs

from .. import commands as c
from .. import events as e
from ..amounts import as_real
from ..cluster import Cluster
from ..errors import InvalidRequest, PolicyError, shown
from ..machines import Machine
from ..types import Request, RequestId, State, Tier, Worker, WorkerId
from .agenda import Agenda
from .engines import Engine, staying, surplus
from .faults import Crash, Places
from .handover import Handovers, Pair
from .ledger import Ledger
from .links import Links
from .outcome import Outcome
from .report import Report, Slo
from .sequence import EngineSettings, Sequence
from .worker import ModelWorker
from .workload import Job, Workload

_SHORTEST_S = 1e-3
_MOST_IDLE_TICKS = 10_000
"""In a row that a run waits for an autoscaler when nothing else is to come."""


@attrs.define(eq=False)
class Simulator:
    """Drives a cluster through a workload, once.

    The cluster and its policies are the caller's, and keep what they have seen:
    for another run make others, or use `simulate`, which copies the policies.
    Everything is a function of the cluster's seed and the workload: equal
    runs give equal reports.  A policy that fails raises here, since whoever
    writes it wants to see where.

    Attributes:
        cluster: The same state machine that drives live engines.
        machine: Step times of workers that name no machine of *machines*.
        machines: Step times by the name in `Worker.machine`, for a mixed fleet.
        settings: How the engines schedule.
        spawn: Makes the worker of a given number, for a pool or for "", when
            the autoscaler wants one more.  A worker belongs to the pool of its
            machine, its model or its role.
        crashes: Workers that die on the way.
        tick_s: Seconds between two `Tick` events for an autoscaler; 0 for none but
            those at deadlines.
        signals_s: Seconds between two reports of each engine; 0 for none.

    Raises:
        InvalidRequest: A machine is none, or a time is below a millisecond.

    >>> from llmd import Cluster, Worker
    >>> from llmd.sim import workloads
    >>> simulator = Simulator(Cluster())
    >>> report = simulator.run(
    ...     workloads.dialogue(rate=4.0, requests=50), [Worker(id="w0")])
    >>> report.completed
    50
    """

    cluster: Cluster
    machine: Machine = attrs.field(factory=Machine)
    machines: Mapping[str, Machine] = attrs.field(factory=dict, kw_only=True)
    settings: EngineSettings = attrs.field(factory=EngineSettings)
    spawn: Callable[[int, str], Worker] | None = None
    crashes: tuple[Crash, ...] = ()
    tick_s: float = 1.0
    signals_s: float = 0.0

    engines: dict[WorkerId, Engine] = attrs.field(factory=dict, init=False)
    ledger: Ledger = attrs.field(factory=Ledger, init=False)
    now: float = attrs.field(default=0.0, init=False)
    _handovers: Handovers = attrs.field(init=False)
    _agenda: Agenda = attrs.field(factory=Agenda, init=False)
    _spawned: int = attrs.field(default=0, init=False)
    _places: Places = attrs.field(factory=Places, init=False)
    # When it looks again for what time alone brings, and when it last did.
    _looks_at: float = attrs.field(default=math.inf, init=False)
    _looked_at: float = attrs.field(default=-math.inf, init=False)
    # How many found nothing else to come.
    _idle_ticks: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        for name, machine in self.machines.items():
            if not isinstance(machine, Machine):
                raise InvalidRequest(f"machines[{name!r}] is {shown(machine)}")
        for name in ("tick_s", "signals_s"):
            every = as_real(getattr(self, name))
            if every and not _SHORTEST_S <= every < math.inf:
                raise InvalidRequest(
                    f"{name} is {every}, want 0, or a millisecond or more"
                )
        self._handovers = Handovers(Links(bytes_per_s=_link(self.machine)))

    def run(
        self,
        workload: Workload,
        workers: Iterable[Worker],
        *,
        until: float = math.inf,
        give_up: Slo | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Report:
        """Play *workload* on *workers* and report.

        Args:
            workload: What arrives.
            workers: Who is there at the start.
            until: Stop then; what has not ended counts as unfinished.
            give_up: Stop as soon as this cannot be met any more.
            progress: Called with the number of requests that ended, often.

        Raises:
            PolicyError: A policy raised, or broke its contract.
        """
        if self.engines:
            raise InvalidRequest("a simulator runs once: make another")
        self.ledger = Ledger.of(workload, give_up)
        self.ledger.progress = progress
        # Traces may begin at any time, and what was before is nobody's.
        begins = [job.at for job in self.ledger.heads()]
        begins += [crash.at for crash in self.crashes]
        self.now = max(min(begins, default=0.0), 0.0)
        for worker in workers:
            self._start(worker)
        self._schedule()
        for at, action, argument in self._agenda.until(until):
            self.now = at
            action(argument)
            if self.ledger.misses_left < 0:
                break
        if not self._agenda:
            self.ledger.tell_who_waits(self.cluster)
        return Report.of(self, workload)

    def _start(self, worker: Worker) -> None:
        if worker.state not in (State.READY, State.STARTING):
            raise InvalidRequest(
                f"worker {worker.id!r} is {worker.state.value}, and nothing here would"
                " change that: want ready, or starting"
            )
        self._join(worker, worker.state)

    def _schedule(self) -> None:
        for job in self.ledger.heads():
            self._agenda.put(job.at, self._arrive, job)
        if self.tick_s and self.cluster.autoscaler is not None:
            self._agenda.put(self.now, self._tick, None)
        if self.signals_s:
            self._agenda.put(self.now, self._signal, None)
        for crash in self.crashes:
            if self.cluster.autoscaler is None:  # which may yet start anybody
                crash.check(self.engines)
            self._agenda.put(crash.at, self._crash, crash)

    # What the world does.

    def _arrive(self, job: Job) -> None:
        outcome = self.ledger.outcomes[job.id]
        request = job.request
        if request.arrived_at != self.now:
            request = attrs.evolve(request, arrived_at=self.now)
        outcome.arrived = self.now
        outcome.request = request
        if job.cancel_after_s < math.inf:
            self._agenda.put(self.now + job.cancel_after_s, self._cancel, job.id)
        try:
            self._feed(e.RequestArrived(self.now, request))
        except PolicyError:
            raise
        except InvalidRequest as error:
            self._close(request.id, f"refused: {error}")
        if request.deadline < math.inf:
            self._agenda.put(max(request.deadline, self.now), self._expire, job.id)

    def _expire(self, id: RequestId) -> None:
        if not self.ledger.outcomes[id].status:
            self._feed(e.Tick(self.now))

    def _cancel(self, id: RequestId) -> None:
        outcome = self.ledger.outcomes[id]
        if not outcome.status:
            self._count(id)
            self._close(id, "cancelled")
            self._feed(e.RequestCancelled(self.now, id))

    def _count(self, id: RequestId) -> None:
        """Count what a client has of an answer by now."""
        outcome = self.ledger.outcomes[id]
        if engine := self.engines.get(outcome.worker):
            seen = engine.model.generated(id, self.now)
            outcome.generated = max(outcome.generated, seen)

    def _wake(self, engine: Engine) -> None:
        if engine.wake != self.now or not engine.there:
            return  # An earlier plan that was changed since.
        model = engine.model
        engine.wake = math.nan
        model.finish(self.now)
        self._take_events(engine)
        if not model.busy and engine.there:
            self._awake(engine, model.plan(self.now))
        self._leave_if_done(engine)

    def _tick(self, _: None) -> None:
        self._feed(e.Tick(self.now))
        # With nothing else to come, only an autoscaler may still change things.
        self._idle_ticks = self._idle_ticks + 1 if self._quiet else 0
        if self.ledger.open and self._idle_ticks <= _MOST_IDLE_TICKS:
            self._agenda.put(self.now + self.tick_s, self._tick, None)

    def _signal(self, _: None) -> None:
        for id, engine in self.engines.items():
            if engine.there:
                self._feed(
                    e.SignalsReported(self.now, id, engine.model.signals(self.now))
                )
        ticking = self._agenda.has(self._tick)
        if self.ledger.open and (ticking or not self._quiet):
            self._agenda.put(self.now + self.signals_s, self._signal, None)

    @property
    def _quiet(self) -> bool:
        """Whether nothing is to come that could let anybody go on."""
        return self._agenda.only(self._tick, self._signal, self._expire)

    def _crash(self, crash: Crash) -> None:
        id = self._places.holder(crash.worker)
        engine = self.engines.get(id)
        if engine is None or not engine.there:
            return
        engine.model.die(self.now)
        self._take_events(engine)
        self._leave(id)
        if crash.restart_after_s < math.inf:
            worker = self._places.taken(engine.model.worker, self.now, self.engines)
            self._agenda.put(self.now + crash.restart_after_s, self._rejoin, worker)

    def _rejoin(self, worker: Worker) -> None:
        if self.ledger.open:
            self._join(worker, State.READY)

    def _ready(self, worker: WorkerId) -> None:
        if self.engines[worker].there and self.ledger.open:
            self._feed(e.WorkerChanged(self.now, worker, state=State.READY))

    # What the cluster commands.

    def _feed(self, event: e.Event) -> None:
        commands = self.cluster.handle(event)
        for command in commands:
            if isinstance(command, c.Fail):  # before an abort loses count
                self._count(command.request.id)
        for command in commands:
            self._carry_out(command)
        self._watch()

    def _watch(self) -> None:
        """Let the cluster look again when time alone may let somebody go."""
        at = self.cluster.opens_at()
        if at < self._looks_at and at > self._looked_at:
            self._looks_at = max(at, self.now)
            self._agenda.put(self._looks_at, self._look, self._looks_at)

    def _look(self, at: float) -> None:
        if at == self._looks_at:
            self._looks_at, self._looked_at = math.inf, at
            self._feed(e.Tick(self.now))

    def _carry_out(self, command: c.Command) -> None:
        match command:
            case c.Dispatch():
                self._dispatch(command)
            case c.Fail(request=request, error=error):
                if isinstance(error, PolicyError):
                    raise error
                self._close(request.id, f"{type(error).__name__}: {error}")
            case c.Abort(worker=worker, request_id=id):
                self._abort(worker, id)
            case c.Scale(workers=workers, pool=pool):
                self._scale(workers, pool)

    def _dispatch(self, command: c.Dispatch) -> None:
        request, decision = command.request, command.decision
        outcome = self.ledger.outcomes[request.id]
        if not outcome.generated:
            outcome.dispatched = self.now
        outcome.worker = decision.decode
        outcome.attempts += 1
        if decision.prefill is not None and decision.prefill != decision.decode:
            outcome.prefill_worker = decision.prefill
            self._drop(request.id)
            pair = Pair(decision.prefill, decision.decode)
            self._handovers.promise(request.id, pair)
        engine = self.engines[decision.first]
        separate = decision.first != decision.decode
        self._submit(engine, outcome, request, prefill_only=separate)

    def _submit(
        self,
        engine: Engine,
        outcome: Outcome,
        request: Request,
        *,
        prefill_only: bool = False,
        remote: bool = False,
    ) -> None:
        model, job = engine.model, outcome.job
        room = (
            min(model.worker.max_model_tokens, model.worker.kv_tokens)
            - request.prompt_tokens
        )
        sequence = Sequence(
            request,
            job.answer,
            max(min(job.output_tokens, room), 1),
            request.hashes(model.worker.block_tokens).tolist(),
            prefill_only=prefill_only,
            remote=remote,
            given=outcome.generated,
        )
        if intake := model.expect(sequence):
            self._agenda.put(self.now + intake, self._enter, (engine, sequence))
        else:
            self._enter((engine, sequence))

    def _enter(self, entry: tuple[Engine, Sequence]) -> None:
        engine, sequence = entry
        if engine.there:
            self._awake(engine, engine.model.submit(sequence, self.now))
            if not engine.model.busy:
                self._take_events(engine)
            self._leave_if_done(engine)

    def _awake(self, engine: Engine, at: float | None) -> None:
        if at is not None:
            engine.wake = at
            self._agenda.put(at, self._wake, engine)
        if engine.model.has_news:
            self._agenda.put(self.now, self._news, engine)

    def _news(self, engine: Engine) -> None:
        """Pass on what an engine told outside of its steps, in the same instant."""
        if engine.there:
            self._take_events(engine)

    def _take_events(self, engine: Engine) -> None:
        for event in engine.model.take():
            self.ledger.note(event)
            if isinstance(event, e.PrefillEnded):
                self._hand_over(event.request_id)
            elif isinstance(event, e.RequestEnded) and event.error is None:
                self._close(event.request_id, "completed")
            self._feed(event)

    def _close(self, id: RequestId, status: str) -> None:
        for job in self.ledger.close(id, status, self.now):
            self._agenda.put(self.now + job.think_s, self._arrive, job)

    # Hand-over of KV from a prefill worker.

    def _hand_over(self, id: RequestId) -> None:
        pair = self._handovers.of(id)
        if pair is None:  # given up in this very instant
            return
        engine = self.engines[pair.target].model
        request = self.ledger.outcomes[id].request
        size = engine.worker.block_tokens
        held = engine.kv.cache.held(request.hashes(size).tolist()) * size
        moved = (request.prompt_tokens - held) * engine.machine.kv_bytes_per_token
        self._handovers.begin(id, moved, self.now)
        self._expect_arrival()

    def _expect_arrival(self) -> None:
        at = self._handovers.next_end()
        if at < math.inf:
            self._agenda.put(at, self._moved, None)

    def _moved(self, _: None) -> None:
        for id, pair in self._handovers.arrived(self.now):
            source, target = self.engines[pair.source], self.engines[pair.target]
            outcome = self.ledger.outcomes[id]
            # First, as one that its target refuses may come back to its source.
            if source.there:
                self._awake(source, source.model.release(id, self.now))
                self._leave_if_done(source)
            if target.there and not outcome.status:
                self._submit(target, outcome, outcome.request, remote=True)
        self._expect_arrival()

    def _drop(self, id: RequestId) -> None:
        """Give a hand-over up: others have its part of the links from now on."""
        pair = self._handovers.drop(id, self.now)
        if pair is None:
            return
        self._expect_arrival()
        for engine in (self.engines[pair.source], self.engines[pair.target]):
            self._abort_on(engine, id)

    def _abort(self, worker: WorkerId, id: RequestId) -> None:
        self._drop(id)
        self._abort_on(self.engines[worker], id)

    def _abort_on(self, engine: Engine, id: RequestId) -> None:
        if engine.there:
            self.ledger.outcomes[id].also_found(engine.model.found(id))
            self._awake(engine, engine.model.abort(id, self.now))
            self._leave_if_done(engine)

    # Workers come and go.

    def _join(self, worker: Worker, state: State) -> None:
        self._spawned += 1
        worker = attrs.evolve(worker, state=state)
        machine = self.machines.get(worker.machine, self.machine)
        self._handovers.links.rates[worker.id] = _link(machine)
        model = ModelWorker(worker, machine, self.settings)
        self.engines[worker.id] = Engine(model, self.now)
        self._feed(e.WorkerJoined(self.now, worker))
        if state is State.STARTING:
            ready_at = self.now + self.settings.cold_start_s
            self._agenda.put(ready_at, self._ready, worker.id)

    def _leave(self, worker: WorkerId) -> None:
        self.engines[worker].left_at = self.now
        for id, _ in self._handovers.of_target(worker):
            self._drop(id)
        self._feed(e.WorkerLeft(self.now, worker))
        for id, pair in self._handovers.of_source(worker):
            # The cluster knows of no prompt there any more, the engine
            # that waits for its KV does.
            self._drop(id)
            why = "the KV to be fetched was lost"
            self._feed(e.RequestEnded(self.now, pair.target, id, why))

    def _leave_if_done(self, engine: Engine) -> None:
        """Let a worker go that was asked to, once nothing is there or promised."""
        there = engine.draining and engine.there
        if there and not self._burden(engine):
            self._leave(engine.model.worker.id)

    def _burden(self, engine: Engine) -> int:
        """Count what an engine has to do, and what is promised to it."""
        promised = self._handovers.of_target(engine.model.worker.id)
        return len(engine.model.held.keys() | {id for id, _ in promised})

    def _scale(self, workers: int, pool: str) -> None:
        alive = staying(self.engines, pool)
        for _ in range(workers - len(alive)):
            if self.spawn is None:
                raise InvalidRequest("the autoscaler wants workers: set `spawn`")
            worker = self.spawn(self._spawned, pool)
            self._join(worker, State.STARTING)
        for id in surplus(alive, workers, lambda id: self._burden(self.engines[id])):
            engine = self.engines[id]
            engine.draining = True
            self._feed(e.WorkerChanged(self.now, id, state=State.DRAINING))
            self._leave_if_done(engine)


def _link(machine: Machine) -> float:
    """Return the bytes a second of a machine's link to others."""
    return machine.load_bytes_per_s[Tier.REMOTE - 1]
