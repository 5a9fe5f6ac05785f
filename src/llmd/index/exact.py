"""An index that believes what engines say of their caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import numpy as np

from ..hashing import Hashes
from ..types import Request, Tier, Worker, WorkerId
from ..view import Ints
from . import windows
from .heard import Heard, ago, of_the_worker
from .holders import Holders, LoggedHolders
from .hopes import Hopes
from .interface import PrefixIndex
from .seats import Rows, Seats


@attrs.define(eq=False)
class ExactIndex(PrefixIndex):
    """Follows every store and remove event of every engine.

    From the dispatch of a request until *grace* seconds after its first token
    (twice as long if nothing else happens) its blocks count as stored, since
    their event is still to come; beyond the first 256 tokens by whole steps of
    256, to be quick.

    Match takes O(distinct depths * log blocks) after hashing, and O(blocks) for
    each worker with sliding windows.  Memory is about 100 bytes a block, however
    many workers hold it.

    Attributes:
        grace: How long after the first token an event may still be on its way.
        max_blocks: Blocks of a tier that are kept; above it the oldest eighth
            goes, so that engines that never tell of evictions cannot fill
            memory.

    >>> index = ExactIndex()
    >>> index.join(Worker(id="a", block_tokens=2), at=0.0)
    >>> request = Request(id="r", prompt=[1, 2, 3, 4, 5])
    >>> index.store("a", request.hashes(2)[:1], 2, Tier.CPU, at=0.0)
    >>> index.match(request, ["a"], at=0.0).tolist()
    [[0, 2, 2, 2]]
    """

    grace: float = 1.0
    max_blocks: int = 1 << 24

    _seats: Seats = attrs.field(factory=Seats, init=False)
    _block_tokens: dict[WorkerId, int] = attrs.field(factory=dict, init=False)
    _sizes: dict[int, int] = attrs.field(factory=dict, init=False)
    _windows: dict[int, int] = attrs.field(factory=dict, init=False)
    _tiers: tuple[LoggedHolders, ...] = attrs.field(
        factory=lambda: tuple(LoggedHolders() for _ in Tier), init=False
    )
    _tiered: bool = attrs.field(default=False, init=False)
    _hopes: Hopes = attrs.field(factory=Hopes, init=False)
    _heard: Heard = attrs.field(factory=Heard, init=False)

    def join(self, worker: Worker, at: float) -> None:
        bit = self._seats.take(worker.id, self._busy())
        self._resize(worker.id, bit, worker.block_tokens)
        self._heard.of(worker.id).facts = worker

    def match(self, request: Request, workers: Sequence[WorkerId], at: float) -> Ints:
        # Others' calls end hopes; an arrival pays only for what they left over.
        self._hopes.expire(at - self.grace)
        rows = self._seats.rows(workers)
        held = rows.nothing()
        for block_tokens, bits in self._sizes.items():
            self._match(request, rows, block_tokens, bits, held)
        if self._windows:
            self._windowed(request, rows, held)
        return held

    def store(
        self, worker: WorkerId, hashes: Hashes, block_tokens: int, tier: Tier, at: float
    ) -> None:
        bit = self._seats.bit(worker) or self._seats.take(worker, self._busy())
        told = self._heard.of(worker)
        told.last = at
        if self._block_tokens.get(worker) != block_tokens:
            self._resize(worker, bit, block_tokens)
        told.block_tokens = block_tokens
        if tier is not Tier.GPU:
            self._tiered = True
        store = self._tiers[tier]
        store.add(bit, hashes)
        if len(store) > self.max_blocks:
            store.trim(self.max_blocks - self.max_blocks // 8)

    def window(self, worker: WorkerId, tokens: int, at: float) -> None:
        bit = self._seats.bit(worker) or self._seats.take(worker, self._busy())
        self._windows[bit] = tokens

    def remove(self, worker: WorkerId, hashes: Hashes, tier: Tier, at: float) -> None:
        names = hashes.tolist()
        self._tiers[tier].drop(self._seats.bit(worker), names)
        self._heard.of(worker).last = at
        if tier is Tier.GPU:
            self._heard.removed(worker, names, at)

    def forget(self, worker: WorkerId, reason: str, at: float) -> None:
        block_tokens = self._block_tokens.get(worker)
        self._vacate(worker)
        if block_tokens is not None:
            bit = self._seats.take(worker, self._busy())
            self._resize(worker, bit, block_tokens)
        self._heard.of(worker).dropped = at, reason

    def leave(self, worker: WorkerId, at: float) -> None:
        self._vacate(worker)
        self._heard.left(worker)

    def expect(self, worker: WorkerId, request: Request, at: float) -> None:
        bit = self._seats.bit(worker)
        if bit:
            self._hopes.add(worker, bit, request, self._block_tokens[worker])
            self._heard.asked(request)

    def settle(
        self, worker: WorkerId, request: Request, cached_tokens: int | None, at: float
    ) -> None:
        self._hopes.settle(worker, request, at + self.grace)
        self._hopes.expire(at)  # here rather than in the path of an arrival

    def revoke(self, worker: WorkerId, request: Request, at: float) -> None:
        self._hopes.revoke(worker, request)
        self._hopes.expire(at)

    def block_tokens(self, worker: WorkerId) -> int:
        """Return the tokens of a block of *worker*, 16 if it is not known."""
        return self._block_tokens.get(worker, 16)

    @property
    def swept(self) -> bool:
        """Nothing of a worker that was dropped is left in memory."""
        return not self._busy()

    def sweep(self, blocks: int) -> None:
        """Look at up to *blocks* blocks of each tier for what was dropped.

        Storing does so by and by; a driver that idles may hurry it.
        """
        for store in self._tiers:
            store.sweep(blocks)

    def seated(self) -> Iterator[tuple[WorkerId, int, int]]:
        """Yield each worker with the tokens of its blocks and its bit."""
        for worker, block_tokens in self._block_tokens.items():
            yield worker, block_tokens, self._seats.bit(worker)

    def window_tokens(self, bit: int) -> int:
        """Return the tokens that the worker *bit* looks back; 0 if all."""
        return self._windows.get(bit, 0)

    def held(self, bit: int, tier: Tier) -> list[int]:
        """Return the names that the worker *bit* holds in *tier*."""
        return [*self._tiers[tier].names(bit)]

    def diagnose(self, request: Request, worker: WorkerId, at: float) -> list[str]:
        bit = self._seats.bit(worker)
        if not bit:
            return ["the worker is not known here"]
        held = int(self.match(request, (worker,), at)[0, -1])
        told = self._heard.of(worker)
        block_tokens = self._block_tokens[worker]
        names = request.hashes(block_tokens)
        if held >= len(names) * block_tokens > 0:
            return [f"it holds all {len(names)} full blocks of the prompt"]
        findings = [f"it holds {held} of {request.prompt_tokens} prompt tokens"]
        findings += of_the_worker(told, request, at)
        if len(names):
            findings += self._of_the_prompt(request, worker, bit, held, at)
        return findings

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken; for tests."""
        for store in self._tiers:
            store.check(self._seats.all)
        self._hopes.check(self._seats.all)
        union = 0
        for bits in self._sizes.values():
            assert bits, "a block size is kept that no worker has"
            assert not bits & union, "a worker has two block sizes"
            union |= bits
        assert all(bit & self._seats.all for bit in self._windows), "a stranger"

    def _match(
        self, request: Request, rows: Rows, tokens: int, bits: int, held: Ints
    ) -> None:
        """Match the workers *bits*, whose blocks have *tokens* tokens."""
        names = request.hashes(tokens)
        fast, *slower = self._tiers
        closed = bits & ~sum(self._windows) if self._windows else bits
        fast.reach(names, closed, rows, held, tokens)
        if len(self._hopes.holders):
            self._hopes.reach(names, tokens, bits, rows, held)
        if self._tiered:
            with_fast: tuple[Holders, ...] = ()
            for tier, store in enumerate(slower, start=1):
                if len(store):
                    with_fast = (*with_fast, store)
                    fast.reach(
                        *(names, closed, rows, held, tokens),
                        tier=tier,
                        others=with_fast,
                    )

    def _windowed(self, request: Request, rows: Rows, held: Ints) -> None:
        """Raise the workers of sliding windows to what theirs may skip."""
        fast = self._tiers[Tier.GPU]
        for worker, tokens in self._block_tokens.items():
            bit = self._seats.bit(worker)
            row = rows.row(bit)
            if row is not None and bit in self._windows:
                reach = windows.blocks(self._windows[bit], tokens)
                names = request.hashes(tokens)
                depth = windows.depth(fast.find, names, bit, reach)
                held[row] = np.maximum(held[row], depth * tokens)

    def _of_the_prompt(
        self, request: Request, worker: WorkerId, bit: int, held: int, at: float
    ) -> list[str]:
        """Return findings about the first block that *worker* lacks."""
        block_tokens = self._block_tokens[worker]
        missing = int(request.hashes(block_tokens)[held // block_tokens])
        when = self._heard.removed_at(worker, missing)
        if when is not None:
            return [f"the block after token {held} was evicted {ago(at, when)}"]
        others = self._under_other_names(request, bit, held // block_tokens)
        if others:
            return [f"it holds more of the same prompt {names}" for names in others]
        return [f"it never told of the block after token {held}"]

    def _under_other_names(self, request: Request, bit: int, block: int) -> list[str]:
        """Say under which salts and adapters *bit* holds the prompt's next block."""
        found = []
        for salt, lora in {("", ""): None, **self._heard.seeds}:
            if (salt, lora) == (request.salt, request.lora):
                continue
            other = attrs.evolve(request, salt=salt, lora=lora)
            name = int(other.hashes(self._size_of(bit))[block])
            if self._tiers[Tier.GPU].find(name, 0) & bit:
                differs = []
                if salt != request.salt:
                    differs.append(f"under the salt {salt!r}, not {request.salt!r}")
                if lora != request.lora:
                    differs.append(f"for the adapter {lora!r}, not {request.lora!r}")
                found.append(" and ".join(differs))
        return found

    def _size_of(self, bit: int) -> int:
        return next(size for size, bits in self._sizes.items() if bits & bit)

    def _vacate(self, worker: WorkerId) -> None:
        bit = self._seats.leave(worker)
        for store in self._tiers:
            store.clear(bit)
        self._hopes.clear(bit)
        self._windows.pop(bit, None)
        if self._block_tokens.pop(worker, None) is not None:
            self._resized(bit, None)

    def _resize(self, worker: WorkerId, bit: int, block_tokens: int) -> None:
        self._block_tokens[worker] = block_tokens
        self._resized(bit, block_tokens)

    def _resized(self, bit: int, block_tokens: int | None) -> None:
        sizes = {size: bits & ~bit for size, bits in self._sizes.items()}
        if block_tokens is not None:
            sizes[block_tokens] = sizes.get(block_tokens, 0) | bit
        self._sizes = {size: bits for size, bits in sizes.items() if bits}

    def _busy(self) -> int:
        """Bits that no newcomer may have: their blocks are not swept yet."""
        busy = 0
        for store in self._tiers:
            busy |= store.dead
        return busy
