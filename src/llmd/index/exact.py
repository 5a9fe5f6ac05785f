"""An index that believes what engines say of their caches."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import attrs
import numpy as np

from ..blocks import Hashes
from ..types import Request, Tier, Worker, WorkerId
from ..view import Ints
from .holders import Holders
from .interface import PrefixIndex
from .seats import Seats, columns, spread

_DEFAULT_BLOCK_TOKENS = 16


@attrs.define(eq=False)
class _Hope:
    """Blocks that a request sent to a worker will store, until told otherwise."""

    bit: int
    names: list[int]
    until: float = np.inf


@attrs.define(eq=False)
class ExactIndex(PrefixIndex):
    """Follows every store and remove event of every engine.

    From the dispatch of a request until *grace* seconds after its first token
    its blocks count as stored, since their event is still to come.

    Match takes O(distinct depths * log blocks) after hashing.  Memory is about
    100 bytes a block, however many workers hold it.

    Attributes:
        grace: How long after the first token an event may still be on its way.

    >>> index = ExactIndex()
    >>> index.join(Worker(id="a", block_tokens=2), at=0.0)
    >>> request = Request(id="r", prompt=[1, 2, 3, 4, 5])
    >>> index.store("a", request.hashes(2)[:1], 2, Tier.CPU, at=0.0)
    >>> index.match(request, ["a"], at=0.0).tolist()
    [[0, 2, 2, 2]]
    """

    grace: float = 1.0

    _seats: Seats = attrs.field(factory=Seats, init=False)
    _block_tokens: dict[WorkerId, int] = attrs.field(factory=dict, init=False)
    _sizes: dict[int, int] = attrs.field(factory=dict, init=False)
    _tiers: tuple[Holders, ...] = attrs.field(
        factory=lambda: tuple(Holders() for _ in Tier), init=False
    )
    _hoped: Holders = attrs.field(factory=Holders, init=False)
    _hopes: dict[tuple[WorkerId, str], _Hope] = attrs.field(factory=dict, init=False)
    _expiring: deque[_Hope] = attrs.field(factory=deque, init=False)

    def join(self, worker: Worker, at: float) -> None:
        bit = self._seats.take(worker.id, self._busy())
        self._resize(worker.id, bit, worker.block_tokens)

    def match(self, request: Request, workers: Sequence[WorkerId], at: float) -> Ints:
        if self._expiring and self._expiring[0].until <= at:
            self._expire(at)
        rows = self._seats.rows(workers)
        held: Ints | None = None
        for block_tokens, bits in self._sizes.items():
            found = self._match(request, rows, len(workers), block_tokens, bits)
            held = found if held is None else held + found
        if held is None:
            return np.zeros((len(workers), len(Tier)), dtype=np.int64)
        return held

    def store(
        self, worker: WorkerId, hashes: Hashes, block_tokens: int, tier: Tier, at: float
    ) -> None:
        bit = self._seats.take(worker, self._busy())
        if self._block_tokens.get(worker) != block_tokens:
            self._resize(worker, bit, block_tokens)
        self._tiers[tier].add(bit, hashes.tolist())

    def remove(self, worker: WorkerId, hashes: Hashes, tier: Tier, at: float) -> None:
        self._tiers[tier].discard(self._seats.bit(worker), hashes.tolist())

    def forget(self, worker: WorkerId, reason: str, at: float) -> None:
        block_tokens = self._block_tokens.get(worker)
        self.leave(worker, at)
        if block_tokens is not None:
            bit = self._seats.take(worker, self._busy())
            self._resize(worker, bit, block_tokens)

    def leave(self, worker: WorkerId, at: float) -> None:
        bit = self._seats.leave(worker)
        for store in (*self._tiers, self._hoped):
            store.clear(bit)
        self._hopes = {
            key: hope for key, hope in self._hopes.items() if hope.bit != bit
        }
        if self._block_tokens.pop(worker, None) is not None:
            self._resized(bit, None)

    def expect(self, worker: WorkerId, request: Request, at: float) -> None:
        bit = self._seats.bit(worker)
        block_tokens = self._block_tokens.get(worker, _DEFAULT_BLOCK_TOKENS)
        hashes = request.hashes(block_tokens)
        known = self._tiers[Tier.GPU].depths(hashes, self._seats.all)
        own = max((depth for mask, depth in known if mask & bit), default=0)
        names = hashes[own:].tolist()
        if bit and names:
            self._hoped.add(bit, names)
            self._hopes[worker, request.id] = _Hope(bit, names)

    def settle(
        self, worker: WorkerId, request: Request, cached_tokens: int | None, at: float
    ) -> None:
        hope = self._hopes.pop((worker, request.id), None)
        if hope is not None:
            hope.until = at + self.grace
            self._expiring.append(hope)

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken; for tests."""
        for store in (*self._tiers, self._hoped):
            store.check(self._seats.all)
        union = 0
        for bits in self._sizes.values():
            assert bits, "a block size is kept that no worker has"
            assert not bits & union, "a worker has two block sizes"
            union |= bits

    def _match(
        self, request: Request, rows: dict[int, int], size: int, tokens: int, bits: int
    ) -> Ints:
        """Match the workers *bits*, whose blocks have *tokens* tokens."""
        hashes = request.hashes(tokens)
        stores = [store for store in self._tiers[1:] if len(store)]
        fast = self._tiers[Tier.GPU]
        found = fast.depths(hashes, bits, (self._hoped,))
        held = columns(spread(found, rows, size, tokens))
        if stores:
            for tier in Tier:
                if tier is not Tier.GPU:
                    others = (self._hoped, *self._tiers[1 : tier + 1])
                    found = fast.depths(hashes, bits, others)
                    held[:, tier] = spread(found, rows, size, tokens)
        return held

    def _resize(self, worker: WorkerId, bit: int, block_tokens: int) -> None:
        self._block_tokens[worker] = block_tokens
        self._resized(bit, block_tokens)

    def _resized(self, bit: int, block_tokens: int | None) -> None:
        sizes = {size: bits & ~bit for size, bits in self._sizes.items()}
        if block_tokens is not None:
            sizes[block_tokens] = sizes.get(block_tokens, 0) | bit
        self._sizes = {size: bits for size, bits in sizes.items() if bits}

    def _expire(self, at: float) -> None:
        while self._expiring and self._expiring[0].until <= at:
            hope = self._expiring.popleft()
            self._hoped.discard(hope.bit, hope.names)

    def _busy(self) -> int:
        """Bits that no newcomer may have: their blocks are not swept yet."""
        busy = self._hoped.dead
        for store in self._tiers:
            busy |= store.dead
        return busy
