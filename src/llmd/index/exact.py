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
from .seats import Rows, Seats, columns

_HOPE_TOKENS = 128


@attrs.define(eq=False)
class _Hope:
    """Prefixes that a request sent to a worker will store, until told otherwise."""

    bit: int
    names: list[int]
    until: float = np.inf


@attrs.define(eq=False)
class ExactIndex(PrefixIndex):
    """Follows every store and remove event of every engine.

    From the dispatch of a request until *grace* seconds after its first token
    its blocks count as stored, since their event is still to come; to be quick
    about it, only by whole steps of 128 tokens.

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
    _tiered: bool = attrs.field(default=False, init=False)
    _hoped: Holders = attrs.field(factory=Holders, init=False)
    # Worker's bit -> name -> the last hope for it.
    _pending: dict[int, dict[int, _Hope]] = attrs.field(factory=dict, init=False)
    _hopes: dict[tuple[WorkerId, str], _Hope] = attrs.field(factory=dict, init=False)
    _expiring: deque[_Hope] = attrs.field(factory=deque, init=False)

    def join(self, worker: Worker, at: float) -> None:
        bit = self._seats.take(worker.id, self._busy())
        self._resize(worker.id, bit, worker.block_tokens)

    def match(self, request: Request, workers: Sequence[WorkerId], at: float) -> Ints:
        if self._expiring and self._expiring[0].until <= at:
            self._expire(at)
        rows = self._seats.rows(workers)
        sizes = [*self._sizes.items()]
        if not sizes:
            return columns(np.zeros(len(workers), dtype=np.int64))
        held = self._match(request, rows, *sizes[0])
        for block_tokens, bits in sizes[1:]:
            held = held + self._match(request, rows, block_tokens, bits)
        return held

    def store(
        self, worker: WorkerId, hashes: Hashes, block_tokens: int, tier: Tier, at: float
    ) -> None:
        bit = self._seats.take(worker, self._busy())
        if self._block_tokens.get(worker) != block_tokens:
            self._resize(worker, bit, block_tokens)
        if tier is not Tier.GPU:
            self._tiered = True
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
        self._pending.pop(bit, None)
        self._hopes = {
            key: hope for key, hope in self._hopes.items() if hope.bit != bit
        }
        if self._block_tokens.pop(worker, None) is not None:
            self._resized(bit, None)

    def expect(self, worker: WorkerId, request: Request, at: float) -> None:
        bit = self._seats.bit(worker)
        if not bit:
            return
        names = _hoped(request, self._block_tokens[worker])[1].tolist()
        if not names:
            return
        hope = _Hope(bit, names)
        self._hoped.add(bit, names)
        pending = self._pending.setdefault(bit, {})
        pending.update(dict.fromkeys(names, hope))
        self._hopes[worker, request.id] = hope

    def settle(
        self, worker: WorkerId, request: Request, cached_tokens: int | None, at: float
    ) -> None:
        hope = self._hopes.pop((worker, request.id), None)
        if hope is not None:
            hope.until = at + self.grace
            self._expiring.append(hope)
        self._expire(at)  # here rather than in the path of an arrival

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken; for tests."""
        for store in (*self._tiers, self._hoped):
            store.check(self._seats.all)
        for bit, pending in self._pending.items():
            assert bit & self._seats.all, "a stranger is hoped for"
            held = self._hoped.get
            assert all(held(name) & bit for name in pending), "a hope does not count"
        union = 0
        for bits in self._sizes.values():
            assert bits, "a block size is kept that no worker has"
            assert not bits & union, "a worker has two block sizes"
            union |= bits

    def _match(self, request: Request, rows: Rows, tokens: int, bits: int) -> Ints:
        """Match the workers *bits*, whose blocks have *tokens* tokens."""
        hashes = request.hashes(tokens)
        fast = self._tiers[Tier.GPU]
        depths = rows.depths(fast.depths(hashes, bits), tokens)
        if len(self._hoped):
            step, hoped = _hoped(request, tokens)
            found = self._hoped.depths(hoped, bits)
            if found:
                np.maximum(depths, rows.depths(found, step), out=depths)
        held = columns(depths)
        return self._slower(hashes, rows, tokens, bits, held) if self._tiered else held

    def _slower(
        self, hashes: Hashes, rows: Rows, tokens: int, bits: int, held: Ints
    ) -> Ints:
        """Return *held* with what lies in slower tiers."""
        held = held.copy()
        fast, *slower = self._tiers
        stores: tuple[Holders, ...] = ()
        for tier, store in enumerate(slower, start=1):
            if len(store):
                stores = (*stores, store)
                found = fast.depths(hashes, bits, stores)
                deeper = rows.depths(found, tokens)[:, None]
                np.maximum(held[:, tier:], deeper, out=held[:, tier:])
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
            pending = self._pending.get(hope.bit)
            if not pending:
                continue
            lost = [name for name in hope.names if pending.get(name) is hope]
            for name in lost:
                del pending[name]
            self._hoped.discard(hope.bit, lost)

    def _busy(self) -> int:
        """Bits that no newcomer may have: their blocks are not swept yet."""
        busy = self._hoped.dead
        for store in self._tiers:
            busy |= store.dead
        return busy


def _hoped(request: Request, block_tokens: int) -> tuple[int, Hashes]:
    """Return the prefixes to hope for and the tokens from one to the next."""
    stride = max(_HOPE_TOKENS // block_tokens, 1)
    return stride * block_tokens, request.hashes(block_tokens)[stride - 1 :: stride]
