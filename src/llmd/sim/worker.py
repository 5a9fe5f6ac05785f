"""A model worker: what a continuously batching engine does, step by step.

`Scheduler` chooses the steps.  Those that differ in nothing but the length of
contexts are a `Run` and are advanced at once.  A run ends when a request ends, a
prompt ends, blocks run out, or somebody comes who could join; so the cost of a
simulation grows with arrivals and completions and not with tokens.
"""

from __future__ import annotations

from collections import deque

import attrs

from .. import events as e
from ..machines import Machine, merged_context
from ..types import RequestId, Signals, Tier, Worker
from .gauges import Gauges
from .pace import Pace
from .residency import Residency
from .scheduler import Chunk, Scheduler
from .sequence import EngineSettings, Sequence
from .steps import Run


@attrs.define(eq=False)
class ModelWorker:
    """One engine in virtual time.

    Its driver calls `expect`, `submit`, `abort` and `release` at any time, `finish`
    and then `plan` when the time that was last returned has come, and `take` after
    each of them.

    Attributes:
        worker: What it told the cluster.
        machine: Its step times.
        settings: How it schedules.
        log: Of each run: start, end, steps, decoding requests, prompt tokens,
            blocks in use, requests waiting here.
        begun: Prompts whose end gave a token, which no step of decoding counts.
        held: Requests that are here or on their way, by id.

    >>> from llmd import Request
    >>> model = ModelWorker(Worker(id="w"), Machine())
    >>> request = Request(id="r", prompt=range(100))
    >>> end = model.submit(Sequence(request, None, 1, []), now=0.0)
    >>> model.finish(end)
    >>> " ".join(type(event).__name__ for event in model.take())
    'FirstToken RequestEnded'
    """

    worker: Worker
    machine: Machine
    settings: EngineSettings = attrs.field(factory=EngineSettings)
    kv: Residency = attrs.field(init=False)
    log: list[tuple[float, float, int, int, int, int, int]] = attrs.field(
        factory=list, init=False
    )
    begun: int = attrs.field(default=0, init=False)
    held: dict[RequestId, Sequence] = attrs.field(factory=dict, init=False)
    _events: list[e.Event] = attrs.field(factory=list, init=False)
    _scheduler: Scheduler = attrs.field(init=False)
    _orders: int = attrs.field(default=0, init=False)
    _due: deque[tuple[int, Sequence]] = attrs.field(factory=deque, init=False)
    _run: Run | None = attrs.field(default=None, init=False)
    _aborted: bool = attrs.field(default=False, init=False)
    _gauges: Gauges = attrs.field(init=False)
    _pace: Pace = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.kv = Residency(self.worker, self.settings, self._events)
        shares = self.machine.shared_read < 1.0
        self._scheduler = Scheduler(self.worker, self.settings, self.kv, shares)
        self._gauges = Gauges(self.settings.steps_ahead)
        self._pace = Pace(self.machine, ahead=self.settings.steps_ahead > 0)

    @property
    def preemptions(self) -> int:
        """Requests thrown out for want of blocks."""
        return self._scheduler.preemptions

    @property
    def busy(self) -> bool:
        """Whether a run is under way."""
        return self._run is not None

    @property
    def has_news(self) -> bool:
        """Whether `take` would return anything."""
        return bool(self._events)

    def signals(self, now: float) -> Signals:
        """Return what its metrics say, which it sets at the end of each step."""
        run = self._run
        step = 1 if run is None else run.steps_by(now)
        if run is None or step == 1:
            return self._gauges.said
        grown = self._scheduler.decoding.growth(step - 1)
        return self._measured(self._gauges.unseen(run, step - 1), grown)

    def _measured(self, unseen: int = 0, grown: int = 0) -> Signals:
        """Return what its metrics say.

        Args:
            unseen: Of those that wait, who is not known yet.
            grown: Blocks that answers took since the run under way began.
        """
        used = self.kv.cache.used_blocks + grown
        return Signals(
            waiting_requests=float(max(self._scheduler.queued - unseen, 0)),
            running_requests=float(self._scheduler.running),
            kv_usage=used / self.kv.cache.capacity_blocks,
        )

    def take(self) -> list[e.Event]:
        """Return what happened since this was last called."""
        events = self._events[:]
        self._events.clear()
        return events

    def expect(self, sequence: Sequence) -> float:
        """Hold *sequence*, that it be submitted; return in how many seconds."""
        self.held[sequence.request.id] = sequence
        settings, running = self.settings, self._scheduler.running
        tokens = sequence.request.prompt_tokens + sequence.given
        others_s = running * settings.intake_s_per_request
        return settings.intake_s + tokens * settings.intake_s_per_token + others_s

    def submit(self, sequence: Sequence, now: float) -> float | None:
        """Queue *sequence*; return when to call `finish`, if that changed."""
        if sequence.gone:  # on its way here
            return None
        self._orders += 1
        sequence.order = self._orders
        sequence.length = sequence.request.prompt_tokens + sequence.given
        sequence.generated = sequence.reported = sequence.given
        self.held[sequence.request.id] = sequence
        if -(-sequence.length // self.worker.block_tokens) > self.worker.kv_blocks:
            self._end(sequence, now, "the prompt is larger than the KV cache")
            return None
        self._scheduler.push(sequence)
        run = self._run
        if run is None:
            return self._planned(now)
        self._gauges.came(now)
        if self.settings.steps_ahead:
            sequence.missed = run.end_of_step(now)
        first = self._scheduler.queued == 1 or self.settings.by_priority
        return self._cut(now) if first and self._scheduler.joinable else None

    def abort(self, id: RequestId, now: float) -> float | None:
        """Let go of a request, once the step under way has ended.

        Returns:
            When to call `finish`, if that changed.
        """
        sequence = self.held.pop(id, None)
        if sequence is None:
            return None
        sequence.gone = True
        if not sequence.order:
            return None
        if not sequence.blocks:
            scheduler = self._scheduler
            scheduler.queued -= 1
            return None if self._run is None else self._let_in(now)
        if sequence.parked:
            self.kv.free(sequence)
            return self._planned(now) if self._run is None else self._let_in(now)
        self._aborted = True
        return None if self._run is None else self._cut(now)

    def generated(self, id: RequestId, now: float) -> int:
        """Return how many tokens of an answer clients have by *now*."""
        sequence = self.held.get(id)
        decoding = self._scheduler.decoding
        if sequence is None or sequence not in decoding:
            return 0 if sequence is None else sequence.generated
        steps = 0 if self._run is None else self._run.steps_by(now) - 1
        return decoding.generated(sequence) + steps

    def found(self, id: RequestId) -> int | None:
        """Return how much of a prompt was in the cache; None if it did not look."""
        sequence = self.held.get(id)
        return None if sequence is None or sequence.cached < 0 else sequence.cached

    def die(self, now: float) -> None:
        """End the run under way where it is: clients have the tokens so far."""
        run = self._run
        if run is None or (steps := run.steps_by(now) - 1) < 1:
            return
        run.steps = steps
        self.finish(now)
        decoding = self._scheduler.decoding
        for sequence in decoding:
            if not sequence.gone:
                self._progress(sequence, decoding.generated(sequence), now)

    def release(self, id: RequestId, now: float) -> float | None:
        """Give back the blocks of a prompt whose KV another worker has now."""
        sequence = self.held.pop(id, None)
        if sequence is None:
            return None
        self.kv.free(sequence)
        return self._planned(now) if self._run is None else self._let_in(now)

    def _let_in(self, now: float) -> float | None:
        """End the run after the step under way if somebody waits who may join."""
        scheduler = self._scheduler
        may = scheduler.queued and scheduler.joinable
        return self._cut(now) if may else None

    def _planned(self, now: float) -> float | None:
        """Begin a run on an idle engine; where none can begin, its metrics tell."""
        end = self.plan(now)
        if end is None:
            self._gauges.said = self._measured()
        return end

    def plan(self, now: float) -> float | None:
        """Begin the next run; return when it ends, or None if idle."""
        assert self._run is None, "a run is under way"
        scheduler = self._scheduler
        if self._aborted:
            self._aborted = False
            scheduler.sweep(now)
        planned = scheduler.plan(now)
        if planned is None:
            return None
        chunks, steps = planned
        loading = scheduler.loading * self.machine.load_s_per_token(Tier.CPU)
        if self._pace.matters:
            self._pace.begin(now, rested=loading > 0)
            steps = 1 if chunks else steps
        decoding, grown = scheduler.decoding, steps - 1
        spared = (1.0 - self.machine.shared_read) * decoding.repeated_tokens
        context = decoding.context_tokens - spared
        first = self._step_s(chunks, context)
        growth = 0.0
        if grown:
            last = [Chunk(own, done + own * grown) for own, done in chunks]
            more = len(decoding) * grown
            growth = (self._step_s(last, context + more) - first) / grown
        self._run = run = Run(now + loading, steps, first, growth)
        if self._pace.ahead:
            self._pace.run(run, *self._busy_s(chunks))
        return run.end

    def _busy_s(self, chunks: list[Chunk]) -> tuple[float, float, bool]:
        """Return what `Pace.run` asks: how long steps keep the host busy."""
        scheduler = self._scheduler
        decoding, tokens = len(scheduler.decoding), scheduler.prompt_tokens
        ahead = merged_context(chunks)
        own_s = self.machine.busy_s(tokens, ahead, decoding)
        following = scheduler.following()
        if following is None and not scheduler.goes_on:
            return own_s, 0.0, tokens > 0
        next_s = self.machine.busy_s(*(following or (0, 0)), decoding)
        return own_s, next_s, tokens > 0

    def finish(self, now: float) -> None:
        """End the run under way."""
        run, scheduler, cache = self._run, self._scheduler, self.kv.cache
        assert run is not None, "no run is under way"
        self._run = None
        if self._pace.matters:
            self._pace.ended(run, self._multiplied_s(run))
        scheduler.grow(run.steps)
        tokens = scheduler.prompt_tokens * run.steps
        state = (len(scheduler.decoding), tokens, cache.used_blocks, scheduler.queued)
        self.log.append((run.start, now, run.steps, *state))
        scheduler.advance(run.steps)
        self._report(now)
        for sequence in scheduler.decoding.ended():
            self._end(sequence, now)
        for sequence in scheduler.completed():
            self._prefilled(sequence, now)
        self.kv.publish_evicted(now)
        gauges = self._gauges
        gauges.ended(run, self._measured(gauges.unseen(run, run.steps)))

    def _cut(self, now: float) -> float | None:
        """End the run after the step under way; return when, if that is new."""
        run = self._run
        assert run is not None, "no run is under way"
        steps = run.steps_by(now)
        if steps == run.steps:
            return None
        run.steps = steps
        return run.end

    def _step_s(self, chunks: list[Chunk], context_tokens: float) -> float:
        decoding = len(self._scheduler.decoding)
        if not chunks:
            return self.machine.decode_s(decoding, context_tokens)
        tokens = sum([own for own, _ in chunks])
        ahead = merged_context(chunks) if len(chunks) > 1 else chunks[0].context
        pace, rest = self._pace, (decoding, context_tokens)
        return self.machine.step_s(tokens, ahead, *rest, pace.ready, pace.heat)

    def _multiplied_s(self, run: Run) -> float:
        """Return the seconds in which the GPU did not wait for its memory."""
        machine = self.machine
        tokens = self._scheduler.prompt_tokens + len(self._scheduler.decoding)
        slower = 1.0 + machine.hot_slowdown * self._pace.heat
        return run.steps * tokens * machine.prefill_s_per_token * slower

    def _prefilled(self, sequence: Sequence, now: float) -> None:
        """Let a computed prompt answer, or hand it over."""
        request, id = sequence.request, self.worker.id
        self.kv.publish(sequence, now)
        if sequence.gone:
            self.kv.free(sequence)
            return
        if sequence.prefill_only:
            sequence.parked = True
            cached = max(sequence.cached, 0)
            self._events.append(e.PrefillEnded(now, id, request.id, cached))
            return
        sequence.generated += 1
        self.begun += 1
        if sequence.generated == sequence.given + 1:
            sequence.reported = sequence.generated
            self._events.append(e.FirstToken(now, id, request.id, sequence.cached))
        left = sequence.output_tokens - sequence.generated
        if left <= 0:
            self._end(sequence, now)
            return
        decoding = self._scheduler.decoding
        decoding.join(sequence, left)
        due = decoding.steps + self.settings.report_tokens
        self._due.append((due, sequence))

    def _report(self, now: float) -> None:
        """Report progress of those who have made enough of it."""
        due, decoding = self._due, self._scheduler.decoding
        while due and due[0][0] <= decoding.steps:
            _, sequence = due.popleft()
            if sequence in decoding and not sequence.gone:
                self._progress(sequence, decoding.generated(sequence), now)
                due.append((decoding.steps + self.settings.report_tokens, sequence))

    def _progress(self, sequence: Sequence, generated: int, now: float) -> None:
        more = generated - sequence.reported
        if more > 0:
            sequence.reported = generated
            id = sequence.request.id
            self._events.append(e.TokensGenerated(now, self.worker.id, id, more))

    def _end(self, sequence: Sequence, now: float, error: str | None = None) -> None:
        sequence.gone = True
        id = sequence.request.id
        self.held.pop(id, None)
        if error is None:
            self._progress(sequence, sequence.generated, now)
            self.kv.keep_answer(sequence, now)
        self.kv.free(sequence)
        self._events.append(e.RequestEnded(now, self.worker.id, id, error))
