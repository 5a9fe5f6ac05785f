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
from collections import deque

import attrs
import numpy as np

from .. import events as e
from ..machines import Machine, merged_context
from ..types import RequestId, Signals, Worker
from .cache import BlockCache
from .sequence import EngineSettings, Sequence
from .steps import Run


@attrs.define(eq=False)
class ModelWorker:
    """One engine in virtual time.

    Its driver calls `submit` and `abort` at any time, `finish` and then `plan`
    when the time that was last returned has come, and takes `events` away.

    Attributes:
        worker: What it told the cluster.
        machine: Its step times.
        settings: How it schedules.
        events: What happened and was not taken away yet.
        log: Of each run: start, end, steps, decoding requests, prompt tokens,
            blocks in use, requests waiting here.
        preemptions: Requests thrown out for want of blocks.
    """

    worker: Worker
    machine: Machine
    settings: EngineSettings = attrs.field(factory=EngineSettings)
    cache: BlockCache = attrs.field(init=False)
    events: list[e.Event] = attrs.field(factory=list, init=False)
    log: list[tuple[float, float, int, int, int, int, int]] = attrs.field(
        factory=list, init=False
    )
    preemptions: int = attrs.field(default=0, init=False)
    held: dict[RequestId, Sequence] = attrs.field(factory=dict, init=False)
    _places: int = attrs.field(init=False)
    _waiting: list[tuple[int, int, Sequence]] = attrs.field(factory=list, init=False)
    _queued: int = attrs.field(default=0, init=False)
    _decoding: dict[Sequence, None] = attrs.field(factory=dict, init=False)
    _bases: int = attrs.field(default=0, init=False)
    _partial: Sequence | None = attrs.field(default=None, init=False)
    _ending: list[tuple[int, int, Sequence]] = attrs.field(factory=list, init=False)
    _due: deque[tuple[int, Sequence]] = attrs.field(factory=deque, init=False)
    _steps: int = attrs.field(default=0, init=False)
    _orders: int = attrs.field(default=0, init=False)
    _run: Run | None = attrs.field(default=None, init=False)
    _chunk: int = attrs.field(default=0, init=False)
    _prompt_tokens: int = attrs.field(default=0, init=False)
    _completing: list[Sequence] = attrs.field(factory=list, init=False)
    _aborted: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self.cache = BlockCache(self.worker.kv_blocks)
        # One token of each step is left for a prompt, so that none starves.
        self._places = min(self.worker.max_running, self.settings.step_tokens - 1)

    @property
    def busy(self) -> bool:
        """Whether a run is under way."""
        return self._run is not None

    @property
    def waiting_requests(self) -> int:
        """Requests in its own queue."""
        return self._queued

    @property
    def running_requests(self) -> int:
        """Requests in its batch."""
        return len(self._decoding) + (self._partial is not None)

    def signals(self) -> Signals:
        """Return what its metrics would say."""
        return Signals(
            waiting_requests=float(self._queued),
            running_requests=float(self.running_requests),
            kv_usage=self.cache.used_blocks / self.cache.capacity_blocks,
        )

    def submit(self, sequence: Sequence, now: float) -> float | None:
        """Queue *sequence*; return when to call `finish`, if that changed."""
        self._orders += 1
        sequence.order = self._orders
        sequence.length = sequence.request.prompt_tokens
        self.held[sequence.request.id] = sequence
        if -(-sequence.length // self.worker.block_tokens) > self.worker.kv_blocks:
            self._end(sequence, now, "the prompt is larger than the KV cache")
            return None
        self._push(sequence)
        if self._run is None:
            return self.plan(now)
        alone = self._queued == 1 or self.settings.by_priority
        if alone and self._partial is None and not self._full():
            return self._cut(now)
        return None

    def abort(self, id: RequestId, now: float) -> float | None:
        """Let go of a request, once the step under way has ended.

        Returns:
            When to call `finish`, if that changed.
        """
        sequence = self.held.pop(id, None)
        if sequence is None:
            return None
        sequence.gone = True
        if not sequence.blocks:
            self._queued -= 1
            return None
        if sequence.parked:
            self._free(sequence)
            return self.plan(now) if self._run is None else None
        self._aborted = True
        return None if self._run is None else self._cut(now)

    def plan(self, now: float) -> float | None:
        """Begin the next run; return when it ends, or None if idle."""
        assert self._run is None, "a run is under way"
        if self._aborted:
            self._sweep()
        while True:
            chunks = self._chunks()
            decoding = len(self._decoding)
            if not chunks and not decoding:
                return None
            steps = self._most_steps(chunks)
            if steps:
                break
            self._preempt()
        context = self._bases + decoding * (self._steps + 1)
        first = self._step_s(chunks, context)
        growth = 0.0
        if steps > 1:
            last = [(tokens, done + tokens * (steps - 1)) for tokens, done in chunks]
            longest = self._step_s(last, context + decoding * (steps - 1))
            growth = (longest - first) / (steps - 1)
        self._run = Run(now, steps, first, growth)
        # Whoever is left half done came last.
        self._chunk = chunks[-1][0] if chunks else 0
        self._prompt_tokens = sum([tokens for tokens, _ in chunks])
        return self._run.end

    def finish(self, now: float) -> None:
        """End the run under way; what it did is in `events`."""
        run = self._run
        assert run is not None, "no run is under way"
        self._run = None
        self._grow(run.steps)
        self.log.append(
            (
                run.start,
                now,
                run.steps,
                len(self._decoding),
                self._prompt_tokens * run.steps,
                self.cache.used_blocks,
                self._queued,
            )
        )
        self._steps += run.steps
        if self._partial is not None:
            self._partial.computed += self._chunk * run.steps
        self._report(now)
        while (end := self._next_end()) is not None and end <= self._steps:
            sequence = heapq.heappop(self._ending)[2]
            self._leave(sequence)
            self._end(sequence, now)
        completing, self._completing = self._completing, []
        for sequence in completing:
            self._prefilled(sequence, now)
        self._publish_evicted(now)

    def release(self, id: RequestId, now: float) -> float | None:
        """Give back the blocks of a prompt whose KV another worker has now."""
        sequence = self.held.pop(id, None)
        if sequence is None:
            return None
        self._free(sequence)
        return self.plan(now) if self._run is None else None

    def _step_s(self, chunks: list[tuple[int, int]], context_tokens: int) -> float:
        decoding = len(self._decoding)
        if not chunks:
            return self.machine.decode_s(decoding, context_tokens)
        tokens = sum([own for own, _ in chunks])
        ahead = merged_context(chunks) if len(chunks) > 1 else chunks[0][1]
        return self.machine.step_s(tokens, ahead, decoding, context_tokens)

    def _push(self, sequence: Sequence) -> None:
        rank = sequence.request.priority if self.settings.by_priority else 0
        heapq.heappush(self._waiting, (rank, sequence.order, sequence))
        self._queued += 1

    def _full(self) -> bool:
        return len(self._decoding) >= self._places

    def _cut(self, now: float) -> float | None:
        run = self._run
        assert run is not None
        steps = run.steps_by(now)
        if steps == run.steps:
            return None
        run.steps = steps
        return run.end

    def _chunks(self) -> list[tuple[int, int]]:
        """Choose the prompts of the next step: (tokens, context before)."""
        budget = self.settings.step_tokens - len(self._decoding)
        chunks = []
        partial = self._partial
        self._completing = []
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
        while budget > 0 and self._waiting:
            sequence = self._waiting[0][2]
            if sequence.gone:
                heapq.heappop(self._waiting)
                continue
            places = len(self._decoding) + len(self._completing)
            if places >= self._places or not self._admit(sequence):
                break
            heapq.heappop(self._waiting)
            self._queued -= 1
            left = sequence.length - sequence.computed
            tokens = min(left, budget)
            chunks.append((tokens, sequence.computed))
            budget -= tokens
            if tokens == left:
                self._completing.append(sequence)
            else:
                self._partial = sequence
        return chunks

    def _admit(self, sequence: Sequence) -> bool:
        """Give *sequence* its blocks, if there are enough."""
        size, cache = self.worker.block_tokens, self.cache
        blocks = -(-sequence.length // size)
        names = sequence.names
        room = cache.free_blocks
        if self._decoding or self._completing:
            room -= int(self.settings.watermark * cache.capacity_blocks)
            if blocks + len(self._decoding) > room:
                room -= self._growth(1)
        hits = 0
        if self.settings.prefix_caching:
            # The last token is always computed: its logits start the answer.
            names = names[: (sequence.length - 1) // size]
            hits = cache.held(names)
        if blocks > room:
            idle = cache.idle_of(names[:hits])
            if blocks - hits + idle > room:
                return False
        cached = names[:hits]
        cache.pin(cached)
        cache.take(blocks - hits)
        reuse = self.settings.prefix_caching
        fresh = cache.label(sequence.names[hits:]) if reuse else []
        sequence.owned = cached + fresh
        sequence.fresh = fresh
        sequence.nameless = blocks - hits - len(fresh)
        sequence.computed = sequence.length - 1 if sequence.remote else hits * size
        if sequence.cached < 0:
            sequence.cached = sequence.computed
        return True

    def _most_steps(self, chunks: list[tuple[int, int]]) -> int:
        """Count the steps for which nothing changes; 0 if blocks are short."""
        if self._completing:
            most = 1
        elif chunks:
            partial, tokens = self._partial, chunks[0][0]
            assert partial is not None
            # A prompt that was just admitted beside others had no full chunk.
            left = partial.length - partial.computed
            alone = len(chunks) == 1
            full = tokens == self.settings.step_tokens - len(self._decoding)
            most = max((left - 1) // tokens, 1) if alone and full else 1
        else:
            most = 1 << 60
        end = self._next_end()
        return most if end is None else self._affordable(min(most, end - self._steps))

    def _next_end(self) -> int | None:
        """Return the step that ends a request, past entries of those that left."""
        ending, decoding = self._ending, self._decoding
        while ending:
            step, _, sequence = ending[0]
            if sequence in decoding and sequence.end_step == step and not sequence.gone:
                return step
            heapq.heappop(ending)
        return None

    def _affordable(self, most: int) -> int:
        """Bound a number of steps by the blocks that decoding needs."""
        free, size = self.cache.free_blocks, self.worker.block_tokens
        if len(self._decoding) * (most // size + 1) <= free:
            return most
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) >> 1
            if self._growth(middle) <= free:
                low = middle
            else:
                high = middle - 1
        return low

    def _growth(self, steps: int) -> int:
        """Count the blocks that *steps* more steps of decoding need."""
        size, now = self.worker.block_tokens, self._steps + self.worker.block_tokens - 1
        bases = [sequence.base + now for sequence in self._decoding]
        later = sum([(base + steps) // size for base in bases])
        return later - sum([base // size for base in bases])

    def _grow(self, steps: int) -> None:
        blocks = self._growth(steps) if self._decoding else 0
        if blocks:
            self.cache.take(blocks)

    def _preempt(self) -> None:
        """Throw out whoever came last; it will be computed again."""
        prompts = [*self._completing, *([self._partial] if self._partial else [])]
        if prompts:
            # The later may use names of the earlier, so they go back first.
            for sequence in reversed(prompts):
                self._put_back(sequence)
            self._partial, self._completing = None, []
            return
        sequence = next(reversed(self._decoding))
        if self.settings.by_priority:
            rank = {s: (s.request.priority, s.order) for s in self._decoding}
            sequence = max(self._decoding, key=rank.__getitem__)
        self._leave(sequence)
        self._put_back(sequence)

    def _put_back(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._drop(sequence)
        sequence.length = sequence.request.prompt_tokens + sequence.generated
        sequence.remote = False
        self._push(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Take *sequence* out of the batch, its books written up."""
        del self._decoding[sequence]
        self._bases -= sequence.base
        size = self.worker.block_tokens
        tokens = sequence.base + self._steps
        sequence.generated += tokens - sequence.length
        sequence.length = tokens
        sequence.nameless = -(-tokens // size) - len(sequence.owned)

    def _prefilled(self, sequence: Sequence, now: float) -> None:
        """Let a computed prompt answer, or hand it over."""
        request, id = sequence.request, self.worker.id
        self._publish(sequence, now)
        if sequence.gone:
            self._free(sequence)
            return
        if sequence.prefill_only:
            sequence.parked = True
            self.events.append(e.PrefillEnded(now, id, request.id))
            return
        sequence.generated += 1
        if sequence.generated == 1:
            sequence.reported = 1
            self.events.append(e.FirstToken(now, id, request.id, sequence.cached))
        left = sequence.output_tokens - sequence.generated
        if left <= 0:
            self._end(sequence, now)
            return
        sequence.base = sequence.length - self._steps
        sequence.end_step = self._steps + left
        self._decoding[sequence] = None
        self._bases += sequence.base
        heapq.heappush(self._ending, (sequence.end_step, sequence.order, sequence))
        self._due.append((self._steps + self.settings.report_tokens, sequence))

    def _report(self, now: float) -> None:
        """Report progress of those who have made enough of it."""
        due, every = self._due, self.settings.report_tokens
        while due and due[0][0] <= self._steps:
            step, sequence = due.popleft()
            if sequence.gone or sequence not in self._decoding:
                continue
            done = sequence.base + self._steps - sequence.length
            self._progress(sequence, sequence.generated + done, now)
            due.append((max(step, self._steps) + every, sequence))

    def _progress(self, sequence: Sequence, generated: int, now: float) -> None:
        more = generated - sequence.reported
        if more > 0:
            sequence.reported = generated
            id = sequence.request.id
            self.events.append(e.TokensGenerated(now, self.worker.id, id, more))

    def _end(self, sequence: Sequence, now: float, error: str | None = None) -> None:
        sequence.gone = True
        self.held.pop(sequence.request.id, None)
        if error is None:
            self._progress(sequence, sequence.generated, now)
            self._keep_answer(sequence, now)
        self._free(sequence)
        id = sequence.request.id
        self.events.append(e.RequestEnded(now, self.worker.id, id, error))

    def _keep_answer(self, sequence: Sequence, now: float) -> None:
        """Name the blocks of the answer, so that a next turn finds them."""
        size = self.worker.block_tokens
        names = sequence.answer_names(size)
        if names is None or not self.settings.prefix_caching:
            return
        have = len(sequence.names)
        fresh = self.cache.label(names[have : sequence.length // size].tolist())
        sequence.owned = sequence.owned + fresh
        sequence.fresh = fresh
        sequence.nameless -= len(fresh)
        self._publish(sequence, now)

    def _free(self, sequence: Sequence) -> None:
        if sequence.owned or sequence.nameless:
            self.cache.release(sequence.owned, sequence.nameless)
            sequence.owned, sequence.nameless = [], 0

    def _publish(self, sequence: Sequence, now: float) -> None:
        if sequence.fresh:
            # What had to go for them went first.
            self._publish_evicted(now)
            self.events.append(
                e.BlocksStored(
                    now,
                    self.worker.id,
                    np.array(sequence.fresh, dtype=np.uint64),
                    self.worker.block_tokens,
                )
            )
            sequence.fresh = []

    def _publish_evicted(self, now: float) -> None:
        if self.cache.evicted:
            names = np.array(self.cache.evicted, dtype=np.uint64)
            self.cache.evicted = []
            self.events.append(e.BlocksRemoved(now, self.worker.id, names))

    def _sweep(self) -> None:
        """Let go of what was aborted."""
        self._aborted = False
        for sequence in [s for s in self._decoding if s.gone]:
            self._leave(sequence)
            self._free(sequence)
        if self._partial is not None and self._partial.gone:
            self._drop(self._partial)
            self._partial = None

    def _drop(self, sequence: Sequence) -> None:
        """Free a prompt that is not computed: its names stand for nothing."""
        self.cache.unlabel(sequence.fresh)
        kept = len(sequence.owned) - len(sequence.fresh)
        sequence.nameless += len(sequence.fresh)
        sequence.owned, sequence.fresh = sequence.owned[:kept], []
        self._free(sequence)
