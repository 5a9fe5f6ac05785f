"""The requests of a batch that generate, counted without touching each.

All of them gain a token a step.  So each keeps what it had less the number of
steps done when it joined, and its tokens at any time are that base plus the
steps done since the beginning of the world.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import attrs

from .sequence import Sequence


@attrs.define(eq=False)
class Decoding:
    """Requests that get one token a step each.

    Attributes:
        block_tokens: Tokens a KV block.
        shares: Count the blocks that several of them read.
        steps: Done so far.

    >>> from llmd import Request
    >>> request = Request(id="r", prompt=range(30))
    >>> sequence = Sequence(request, None, 9, [], length=30, generated=1)
    >>> batch = Decoding(block_tokens=16)
    >>> batch.join(sequence, left=8)
    >>> batch.growth(8), batch.next_end()
    (1, 8)
    """

    block_tokens: int
    shares: bool = False
    steps: int = 0
    _sequences: dict[Sequence, None] = attrs.field(factory=dict, init=False)
    _bases: int = attrs.field(default=0, init=False)
    _readers: dict[int, int] = attrs.field(factory=dict, init=False)
    _repeats: int = attrs.field(default=0, init=False)
    _ends: list[tuple[int, int, Sequence]] = attrs.field(factory=list, init=False)

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._sequences

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def context_tokens(self) -> int:
        """Sum of the contexts that the next step reads."""
        return self._bases + len(self._sequences) * (self.steps + 1)

    @property
    def repeated_tokens(self) -> int:
        """Those of `context_tokens` that somebody else reads as well, but the first."""
        return self._repeats * self.block_tokens

    def join(self, sequence: Sequence, left: int) -> None:
        """Let *sequence* generate *left* tokens more."""
        sequence.base = sequence.length - self.steps
        sequence.end_step = self.steps + left
        self._sequences[sequence] = None
        self._bases += sequence.base
        if self.shares:
            self._count(sequence, 1)
        heapq.heappush(self._ends, (sequence.end_step, sequence.order, sequence))

    def leave(self, sequence: Sequence) -> None:
        """Take *sequence* out and write up what it became."""
        del self._sequences[sequence]
        self._bases -= sequence.base
        if self.shares:
            self._count(sequence, -1)
        tokens = sequence.base + self.steps
        sequence.generated += tokens - sequence.length
        sequence.length = tokens
        blocks = -(-tokens // self.block_tokens)
        sequence.nameless = blocks - len(sequence.owned)

    def _count(self, sequence: Sequence, change: int) -> None:
        """Let *sequence* begin (1) or end (-1) to read its blocks."""
        readers = self._readers
        for name in sequence.owned:
            before = readers.get(name, 0)
            readers[name] = after = before + change
            if not after:
                del readers[name]
            elif before:
                self._repeats += change

    def generated(self, sequence: Sequence) -> int:
        """Return how many tokens of its answer *sequence* has by now."""
        return sequence.generated + sequence.base + self.steps - sequence.length

    def next_end(self) -> int | None:
        """Return the step that ends a request, if any will."""
        ends = self._ends
        while ends:
            step, _, sequence = ends[0]
            here = sequence in self._sequences and not sequence.gone
            if here and sequence.end_step == step:
                return step
            heapq.heappop(ends)  # Of a request that left before.
        return None

    def ended(self) -> Iterator[Sequence]:
        """Take out and yield those whose last step is done."""
        while (end := self.next_end()) is not None and end <= self.steps:
            sequence = heapq.heappop(self._ends)[2]
            self.leave(sequence)
            yield sequence

    def growth(self, steps: int) -> int:
        """Count the blocks that *steps* more steps need."""
        size = self.block_tokens
        now = self.steps + size - 1
        bases = [sequence.base + now for sequence in self._sequences]
        later = sum([(base + steps) // size for base in bases])
        return later - sum([base // size for base in bases])

    def affordable(self, most: int, free_blocks: int) -> int:
        """Return how many steps, up to *most*, need no more than *free_blocks*."""
        if len(self._sequences) * (most // self.block_tokens + 1) <= free_blocks:
            return most
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) >> 1
            if self.growth(middle) <= free_blocks:
                low = middle
            else:
                high = middle - 1
        return low

    def last(self, *, by_priority: bool) -> Sequence:
        """Return who came last, or of the lowest priority who came last."""
        if not by_priority:
            return next(reversed(self._sequences))
        return max(self._sequences, key=lambda s: (s.request.priority, s.order))
