"""A model worker: what a continuously batching engine does, step by step.

The order of work is vLLM's (`v1/core/sched/scheduler.py`): each step has a
budget of tokens; requests that decode take one each, a prompt that was begun
takes what is left, and if anything is left after that, waiting requests are
admitted in order while there are places and blocks.  So at most one prompt is
half done, and while it takes the whole budget nobody can join.

Steps that differ in nothing but the length of contexts are a `Run` and are
advanced at once.  A run ends when a request ends, a prompt ends, blocks run
out, or somebody comes who could join; so the cost of a simulation grows with
arrivals and completions and not with tokens.

Names of a prompt's blocks are given when it is admitted, since nobody can be
admitted until it is computed; they are reported when it is.
"""

from __future__ import annotations

import heapq
import math
from collections import deque

import attrs

from .. import events as e
from ..machines import Machine, merged_context
from ..types import RequestId, Signals, Tier, Worker
from .decoding import Decoding
from .gauges import Gauges
from .residency import Residency
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
        preemptions: Requests thrown out for want of blocks.
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
    preemptions: int = attrs.field(default=0, init=False)
    begun: int = attrs.field(default=0, init=False)
    held: dict[RequestId, Sequence] = attrs.field(factory=dict, init=False)
    _events: list[e.Event] = attrs.field(factory=list, init=False)
    _places: int = attrs.field(init=False)
    _waiting: list[tuple[int, int, Sequence]] = attrs.field(factory=list, init=False)
    _queued: int = attrs.field(default=0, init=False)
    _orders: int = attrs.field(default=0, init=False)
    _decoding: Decoding = attrs.field(init=False)
    _due: deque[tuple[int, Sequence]] = attrs.field(factory=deque, init=False)
    # Of the run under way: the prompts it completes, the one it leaves half
    # done, that one's tokens in each step, and all prompt tokens of a step.
    _run: Run | None = attrs.field(default=None, init=False)
    _completing: list[Sequence] = attrs.field(factory=list, init=False)
    _partial: Sequence | None = attrs.field(default=None, init=False)
    _chunk: int = attrs.field(default=0, init=False)
    _prompt_tokens: int = attrs.field(default=0, init=False)
    _loading: int = attrs.field(default=0, init=False)
    _aborted: bool = attrs.field(default=False, init=False)
    _gauges: Gauges = attrs.field(init=False)
    _missed: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self.kv = Residency(self.worker, self.settings, self._events)
        self._decoding = Decoding(self.worker.block_tokens)
        self._gauges = Gauges(self.settings.steps_ahead)
        # One token of each step is left for a prompt, so that none starves.
        self._places = min(self.worker.max_running, self.settings.step_tokens - 1)

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
        grown = self._decoding.growth(step - 1)
        return self._measured(self._gauges.unseen(run, step - 1), grown)

    def _measured(self, unseen: int = 0, grown: int = 0) -> Signals:
        """Return what its metrics say.

        Args:
            unseen: Of those that wait, who is not known yet.
            grown: Blocks that answers took since the run under way began.
        """
        running = len(self._decoding) + len(self._completing)
        used = self.kv.cache.used_blocks + grown
        return Signals(
            waiting_requests=float(max(self._queued - unseen, 0)),
            running_requests=float(running + (self._partial is not None)),
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
        tokens = sequence.request.prompt_tokens + sequence.given
        return self.settings.intake_s + tokens * self.settings.intake_s_per_token

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
        self._push(sequence)
        run = self._run
        if run is None:
            return self._planned(now)
        self._gauges.came(now)
        if self.settings.steps_ahead:
            sequence.missed = run.end_of_step(now)
        first = self._queued == 1 or self.settings.by_priority
        return self._cut(now) if first and self._joinable else None

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
            self._queued -= 1
            # Whoever stood behind it may join.
            return self._cut(now) if self._queued and self._joinable else None
        if sequence.parked:
            self.kv.free(sequence)
            return self._planned(now) if self._run is None else None
        self._aborted = True
        return None if self._run is None else self._cut(now)

    def generated(self, id: RequestId, now: float) -> int:
        """Return how many tokens of an answer clients have by *now*."""
        sequence = self.held.get(id)
        if sequence is None or sequence not in self._decoding:
            return 0 if sequence is None else sequence.generated
        steps = 0 if self._run is None else self._run.steps_by(now) - 1
        return self._decoding.generated(sequence) + steps

    def die(self, now: float) -> None:
        """End the run under way where it is: clients have the tokens so far."""
        run = self._run
        if run is None or (steps := run.steps_by(now) - 1) < 1:
            return
        run.steps = steps
        self.finish(now)
        for sequence in self._decoding:
            if not sequence.gone:
                self._progress(sequence, self._decoding.generated(sequence), now)

    def release(self, id: RequestId, now: float) -> float | None:
        """Give back the blocks of a prompt whose KV another worker has now."""
        sequence = self.held.pop(id, None)
        if sequence is None:
            return None
        self.kv.free(sequence)
        return self._planned(now) if self._run is None else None

    def _planned(self, now: float) -> float | None:
        """Begin a run on an idle engine; where none can begin, its metrics tell."""
        end = self.plan(now)
        if end is None:
            self._gauges.said = self._measured()
        return end

    def plan(self, now: float) -> float | None:
        """Begin the next run; return when it ends, or None if idle."""
        assert self._run is None, "a run is under way"
        if self._aborted:
            self._sweep(now)
        while True:
            chunks = self._chunks(now)
            if not chunks and not len(self._decoding):
                return None
            steps = self._most_steps(chunks)
            if steps:
                break
            self._preempt(now)
        context, grown = self._decoding.context_tokens, steps - 1
        first = self._step_s(chunks, context)
        growth = 0.0
        if grown:
            last = [(tokens, done + tokens * grown) for tokens, done in chunks]
            longest = self._step_s(last, context + len(self._decoding) * grown)
            growth = (longest - first) / grown
        loading = self._loading * self.machine.load_s_per_token(Tier.CPU)
        self._run = Run(now + loading, steps, first, growth)
        # Whoever is left half done came last.
        self._chunk = chunks[-1][0] if chunks else 0
        self._prompt_tokens = sum([tokens for tokens, _ in chunks])
        return self._run.end

    def finish(self, now: float) -> None:
        """End the run under way."""
        run, decoding, cache = self._run, self._decoding, self.kv.cache
        assert run is not None, "no run is under way"
        self._run = None
        if len(decoding):
            cache.take(decoding.growth(run.steps))
        tokens = self._prompt_tokens * run.steps
        state = (len(decoding), tokens, cache.used_blocks, self._queued)
        self.log.append((run.start, now, run.steps, *state))
        decoding.steps += run.steps
        if self._partial is not None:
            self._partial.computed += self._chunk * run.steps
        self._report(now)
        for sequence in decoding.ended():
            self._end(sequence, now)
        completing, self._completing = self._completing, []
        for sequence in completing:
            self._prefilled(sequence, now)
        self.kv.publish_evicted(now)
        gauges = self._gauges
        gauges.ended(run, self._measured(gauges.unseen(run, run.steps)))

    def _push(self, sequence: Sequence) -> None:
        rank = sequence.request.priority if self.settings.by_priority else 0
        heapq.heappush(self._waiting, (rank, sequence.order, sequence))
        self._queued += 1

    @property
    def _joinable(self) -> bool:
        """Whether the run under way leaves a place and part of its budget."""
        free = self._partial is None and len(self._decoding) < self._places
        return free and self._run is not None

    def _cut(self, now: float) -> float | None:
        """End the run after the step under way; return when, if that is new."""
        run = self._run
        assert run is not None, "no run is under way"
        steps = run.steps_by(now)
        if steps == run.steps:
            return None
        run.steps = steps
        return run.end

    def _chunks(self, now: float) -> list[tuple[int, int]]:
        """Choose the prompts of the next step: (tokens, context before)."""
        budget = self.settings.step_tokens - len(self._decoding)
        chunks = []
        partial = self._partial
        self._completing, self._loading = [], 0
        if partial is not None:
            left = partial.length - partial.computed
            tokens = min(left, budget)
            chunks.append((tokens, partial.computed))
            if left > budget:
                return chunks
            # It ends in this step: what is left over goes to others.
            self._partial = None
            self._completing.append(partial)
            budget -= tokens
        # What goes on by itself was scheduled ahead, and newcomers were not seen.
        ahead = now if chunks or len(self._decoding) else math.inf
        self._missed = False
        while budget > 0 and (sequence := self._admitted(ahead)) is not None:
            self._loading += sequence.loaded
            left = sequence.length - sequence.computed
            tokens = min(left, budget)
            chunks.append((tokens, sequence.computed))
            budget -= tokens
            if tokens == left:
                self._completing.append(sequence)
            else:
                self._partial = sequence
        return chunks

    def _admitted(self, ahead: float) -> Sequence | None:
        """Take the next that waits, its blocks given; None if it has to wait.

        Args:
            ahead: Who came in the step that ended now was missed.
        """
        waiting, decoding, cache = self._waiting, self._decoding, self.kv.cache
        while waiting and waiting[0][2].gone:
            heapq.heappop(waiting)
        places = len(decoding) + len(self._completing)
        if not waiting or places >= self._places:
            return None
        sequence, spare = waiting[0][2], 0
        if sequence.missed >= ahead:
            self._missed = True
            return None
        if places:
            spare = int(self.settings.watermark * cache.capacity_blocks)
            blocks = -(-sequence.length // self.worker.block_tokens)
            if blocks + len(decoding) + spare > cache.free_blocks:
                spare += decoding.growth(1)
        if not self.kv.admit(sequence, spare):
            return None
        heapq.heappop(waiting)
        self._queued -= 1
        return sequence

    def _most_steps(self, chunks: list[tuple[int, int]]) -> int:
        """Count the steps for which nothing changes; 0 if blocks are short."""
        most = 1 if chunks or self._missed else 1 << 60
        partial = self._partial
        if partial is not None and len(chunks) == 1 and not self._completing:
            tokens = chunks[0][0]
            # With less than a full chunk it shared its step with others.
            if tokens == self.settings.step_tokens - len(self._decoding):
                most = (partial.length - partial.computed - 1) // tokens
        end = self._decoding.next_end()
        if end is None:
            return most
        most = min(most, end - self._decoding.steps)
        return self._decoding.affordable(most, self.kv.cache.free_blocks)

    def _step_s(self, chunks: list[tuple[int, int]], context_tokens: int) -> float:
        decoding = len(self._decoding)
        if not chunks:
            return self.machine.decode_s(decoding, context_tokens)
        tokens = sum([own for own, _ in chunks])
        ahead = merged_context(chunks) if len(chunks) > 1 else chunks[0][1]
        return self.machine.step_s(tokens, ahead, decoding, context_tokens)

    def _preempt(self, now: float) -> None:
        """Throw out whoever came last; it will be computed again."""
        prompts = [*self._completing, *([self._partial] if self._partial else [])]
        if not prompts:
            prompts = [self._decoding.last(by_priority=self.settings.by_priority)]
            self._decoding.leave(prompts[0])
            prompts[0].computed = prompts[0].length
        self._partial, self._completing = None, []
        # The later may use names of the earlier, so they go back first.
        for sequence in reversed(prompts):
            self.preemptions += 1
            self.kv.drop(sequence, now)
            sequence.length = sequence.request.prompt_tokens + sequence.generated
            sequence.remote = False
            self._push(sequence)

    def _prefilled(self, sequence: Sequence, now: float) -> None:
        """Let a computed prompt answer, or hand it over."""
        request, id = sequence.request, self.worker.id
        self.kv.publish(sequence, now)
        if sequence.gone:
            self.kv.free(sequence)
            return
        if sequence.prefill_only:
            sequence.parked = True
            self._events.append(e.PrefillEnded(now, id, request.id))
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
        self._decoding.join(sequence, left)
        due = self._decoding.steps + self.settings.report_tokens
        self._due.append((due, sequence))

    def _report(self, now: float) -> None:
        """Report progress of those who have made enough of it."""
        due, decoding = self._due, self._decoding
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

    def _sweep(self, now: float) -> None:
        """Let go of what was aborted."""
        self._aborted = False
        for sequence in [s for s in self._decoding if s.gone]:
            self._decoding.leave(sequence)
            self.kv.free(sequence)
        if self._partial is not None and self._partial.gone:
            self.kv.drop(self._partial, now)
            self._partial = None
