"""What an engine computes next: who is admitted, in what chunks, who is thrown out.

The order of work is vLLM's (`v1/core/sched/scheduler.py`): each step has a
budget of tokens; requests that decode take one each, a prompt that was begun
takes what is left, and if anything is left after that, waiting requests are
admitted in order while there are places and blocks.  So at most one prompt is
half done, and while it takes the whole budget nobody can join.

Names of a prompt's blocks are given when it is admitted, since nobody can be
admitted until it is computed; they are reported when it is.
"""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import attrs

from ..types import Worker
from .decoding import Decoding
from .residency import Residency
from .sequence import EngineSettings, Sequence


class Chunk(NamedTuple):
    """A part of a prompt that is computed in one step."""

    tokens: int
    context: int
    """Tokens of the prompt ahead of it."""


@attrs.define(eq=False)
class Scheduler:
    """The requests of an engine, those that wait and those that it computes.

    Attributes:
        worker: What it told the cluster.
        settings: How it schedules.
        kv: Its cache.
        shares: Count the blocks that several requests read.
        decoding: Who generates.
        partial: Whose prompt is half done after the next step.
        completing: Whose prompts end with it.
        prompt_tokens: Of the next step.
        loading: Of the next, those that come from host memory first.
        queued: How many wait.
        preemptions: Requests thrown out for want of blocks.
    """

    worker: Worker
    settings: EngineSettings
    kv: Residency
    shares: bool = False
    decoding: Decoding = attrs.field(init=False)
    partial: Sequence | None = attrs.field(default=None, init=False)
    completing: list[Sequence] = attrs.field(factory=list, init=False)
    prompt_tokens: int = attrs.field(default=0, init=False)
    loading: int = attrs.field(default=0, init=False)
    queued: int = attrs.field(default=0, init=False)
    preemptions: int = attrs.field(default=0, init=False)
    _places: int = attrs.field(init=False)
    _waiting: list[tuple[int, int, Sequence]] = attrs.field(factory=list, init=False)
    _last_chunk: int = attrs.field(default=0, init=False)
    _missed: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self.decoding = Decoding(self.worker.block_tokens, self.shares)
        # One token of each step is left for a prompt, so that none starves.
        self._places = min(self.worker.max_running, self.settings.step_tokens - 1)

    @property
    def running(self) -> int:
        """How many have blocks."""
        prompts = len(self.completing) + (self.partial is not None)
        return len(self.decoding) + prompts

    @property
    def joinable(self) -> bool:
        """Whether the step under way leaves a place and part of its budget."""
        return self.partial is None and len(self.decoding) < self._places

    @property
    def goes_on(self) -> bool:
        """Whether anybody generates after the next step."""
        return len(self.decoding) > 0 or any(s.answers for s in self.completing)

    def push(self, sequence: Sequence) -> None:
        """Let *sequence* wait."""
        rank = sequence.request.priority if self.settings.by_priority else 0
        heapq.heappush(self._waiting, (rank, sequence.order, sequence))
        self.queued += 1

    def plan(self, now: float) -> tuple[list[Chunk], int] | None:
        """Choose the next step and how many like it follow; None if idle."""
        while True:
            chunks = self._chunks(now)
            if not chunks and not len(self.decoding):
                return None
            steps = self._most_steps(chunks)
            if steps:
                # Whoever is left half done came last.
                self._last_chunk = chunks[-1].tokens if chunks else 0
                self.prompt_tokens = sum([chunk.tokens for chunk in chunks])
                return chunks, steps
            self._preempt(now)

    def following(self) -> Chunk | None:
        """Look for the first prompt of the step after the one that was planned."""
        budget = self.settings.step_tokens - len(self.decoding)
        if (partial := self.partial) is not None:
            done = partial.computed + self._last_chunk
            return Chunk(min(partial.length - done, budget), done)
        places = len(self.decoding) + len(self.completing)
        spent = self.prompt_tokens >= budget and places < self._places
        if not (self._missed or spent) or not self.queued:
            return None
        sequence = self._waiting[0][2]
        done = self.kv.found(sequence)
        return Chunk(min(sequence.length - done, budget), done)

    def grow(self, steps: int) -> None:
        """Take the blocks of *steps* more tokens of everybody."""
        if len(self.decoding):
            self.kv.cache.take(self.decoding.growth(steps))

    def advance(self, steps: int) -> None:
        """Take in that *steps* were made."""
        self.decoding.steps += steps
        if self.partial is not None:
            self.partial.computed += self._last_chunk * steps

    def completed(self) -> list[Sequence]:
        """Take away those whose prompts ended with the last step."""
        completed, self.completing = self.completing, []
        return completed

    def sweep(self, now: float) -> None:
        """Let go of what was aborted."""
        for sequence in [s for s in self.decoding if s.gone]:
            self.decoding.leave(sequence)
            self.kv.free(sequence)
        if self.partial is not None and self.partial.gone:
            self.kv.drop(self.partial, now)
            self.partial = None

    def _chunks(self, now: float) -> list[Chunk]:
        """Choose the prompts of the next step."""
        budget = self.settings.step_tokens - len(self.decoding)
        chunks = []
        partial = self.partial
        self.completing, self.loading = [], 0
        if partial is not None:
            left = partial.length - partial.computed
            tokens = min(left, budget)
            chunks.append(Chunk(tokens, partial.computed))
            if left > budget:
                return chunks
            # It ends in this step: what is left over goes to others.
            self.partial = None
            self.completing.append(partial)
            budget -= tokens
        # What goes on by itself was scheduled ahead, and newcomers were not seen.
        ahead = now if chunks or len(self.decoding) else math.inf
        self._missed = False
        while budget > 0 and (sequence := self._admitted(ahead)) is not None:
            self.loading += sequence.loaded
            left = sequence.length - sequence.computed
            tokens = min(left, budget)
            chunks.append(Chunk(tokens, sequence.computed))
            budget -= tokens
            if tokens == left:
                self.completing.append(sequence)
            else:
                self.partial = sequence
        return chunks

    def _admitted(self, ahead: float) -> Sequence | None:
        """Take the next that waits, its blocks given; None if it has to wait.

        Args:
            ahead: Who came in the step that ended now was missed.
        """
        waiting, decoding, cache = self._waiting, self.decoding, self.kv.cache
        while waiting and waiting[0][2].gone:
            heapq.heappop(waiting)
        places = len(decoding) + len(self.completing)
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
        self.queued -= 1
        return sequence

    def _most_steps(self, chunks: list[Chunk]) -> int:
        """Count the steps for which nothing changes; 0 if blocks are short."""
        most = 1 if chunks or self._missed else 1 << 60
        partial = self.partial
        if partial is not None and len(chunks) == 1 and not self.completing:
            tokens = chunks[0].tokens
            # With less than a full chunk it shared its step with others.
            if tokens == self.settings.step_tokens - len(self.decoding):
                most = (partial.length - partial.computed - 1) // tokens
        end = self.decoding.next_end()
        if end is None:
            return most
        most = min(most, end - self.decoding.steps)
        return self.decoding.affordable(most, self.kv.cache.free_blocks)

    def _preempt(self, now: float) -> None:
        """Throw out whoever came last; it will be computed again."""
        prompts = [*self.completing, *([self.partial] if self.partial else [])]
        if not prompts:
            prompts = [self.decoding.last(by_priority=self.settings.by_priority)]
            self.decoding.leave(prompts[0])
            prompts[0].computed = prompts[0].length
        self.partial, self.completing = None, []
        # The later may use names of the earlier, so they go back first.
        for sequence in reversed(prompts):
            self.preemptions += 1
            self.kv.drop(sequence, now)
            sequence.length = sequence.request.prompt_tokens + sequence.generated
            sequence.remote = False
            self.push(sequence)
