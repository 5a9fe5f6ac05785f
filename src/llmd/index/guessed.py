"""An index that guesses caches from the requests that were sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import attrs
import numpy as np

from ..types import Request, Worker, WorkerId
from ..view import Ints
from .holders import Holders
from .interface import PrefixIndex
from .seats import Seats, columns, spread


@attrs.define(eq=False)
class _Sent:
    """The blocks of one request, head first."""

    at: float
    names: list[int]


@attrs.define(eq=False)
class _Cache:
    """What one worker is believed to hold, least recently used first.

    `last` says with which request each block was last used, so that a request
    is recorded by two calls at the speed of C and no block is ever moved.
    """

    bit: int
    block_tokens: int
    capacity_blocks: int
    last: dict[int, _Sent] = attrs.field(factory=dict)
    log: deque[_Sent] = attrs.field(factory=deque)
    logged_blocks: int = 0

    def touch(self, sent: _Sent) -> None:
        """Record *sent*; O(blocks), its bookkeeping amortised."""
        self.last.update(dict.fromkeys(sent.names, sent))
        self.log.append(sent)
        self.logged_blocks += len(sent.names)
        if self.logged_blocks > 2 * self.capacity_blocks + len(self.last):
            self._compact()

    def trim(self, stale: float) -> list[int]:
        """Return and forget what is over capacity or older than *stale*.

        The least recently used request goes first, from its tail, as in vLLM.
        """
        dropped = []
        while self.log:
            oldest = self.log[0]
            expired = oldest.at <= stale
            while oldest.names and (expired or len(self.last) > self.capacity_blocks):
                name = oldest.names.pop()
                self.logged_blocks -= 1
                if self.last.get(name) is oldest:
                    del self.last[name]
                    dropped.append(name)
            if oldest.names:
                break
            self.log.popleft()
        return dropped

    def _compact(self) -> None:
        for sent in self.log:
            sent.names = [name for name in sent.names if self.last[name] is sent]
        self.log = deque(sent for sent in self.log if sent.names)
        self.logged_blocks = len(self.last)


@attrs.define(eq=False)
class GuessedIndex(PrefixIndex):
    """Believes that a worker holds what it was sent, until it must have gone.

    Needs no events.  Each worker's share is bounded by the size of its KV
    cache, least recently used out first, and unused beliefs end after *ttl*
    seconds, looked at whenever that worker is sent something.

    Attributes:
        ttl: Seconds after which an unused block is no longer believed in.

    >>> index = GuessedIndex()
    >>> index.join(Worker(id="a", block_tokens=2), at=0.0)
    >>> index.expect("a", Request(id="r", prompt=[1, 2, 3, 4, 5]), at=0.0)
    >>> index.match(Request(id="s", prompt=[1, 2, 9]), ["a"], at=1.0)[:, 0].tolist()
    [2]
    """

    ttl: float = 600.0

    _seats: Seats = attrs.field(factory=Seats, init=False)
    _caches: dict[WorkerId, _Cache] = attrs.field(factory=dict, init=False)
    _holders: Holders = attrs.field(factory=Holders, init=False)

    def join(self, worker: Worker, at: float) -> None:
        bit = self._seats.take(worker.id, self._holders.dead)
        self._caches[worker.id] = _Cache(bit, worker.block_tokens, worker.kv_blocks)

    def match(self, request: Request, workers: Sequence[WorkerId], at: float) -> Ints:
        rows = self._seats.rows(workers)
        depths: Ints = np.zeros(len(workers), dtype=np.int64)
        for block_tokens in {cache.block_tokens for cache in self._caches.values()}:
            bits = sum(
                cache.bit
                for cache in self._caches.values()
                if cache.block_tokens == block_tokens
            )
            found = self._holders.depths(request.hashes(block_tokens), bits)
            depths += spread(found, rows, len(workers), block_tokens)
        return columns(depths)

    def expect(self, worker: WorkerId, request: Request, at: float) -> None:
        cache = self._caches.get(worker)
        if cache is None:
            return
        names = request.hashes(cache.block_tokens)[: cache.capacity_blocks].tolist()
        self._holders.add(cache.bit, names)
        cache.touch(_Sent(at, names))
        self._holders.discard(cache.bit, cache.trim(at - self.ttl))

    def forget(self, worker: WorkerId, reason: str, at: float) -> None:
        cache = self._caches.get(worker)
        if cache is not None:
            self._holders.discard(cache.bit, cache.last)
            self._caches[worker] = _Cache(
                cache.bit, cache.block_tokens, cache.capacity_blocks
            )

    def leave(self, worker: WorkerId, at: float) -> None:
        self.forget(worker, "left", at)
        self._caches.pop(worker, None)
        self._seats.leave(worker)

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken; for tests."""
        self._holders.check(self._seats.all)
        for cache in self._caches.values():
            assert len(cache.last) <= cache.capacity_blocks, "over capacity"
            logged = sum(len(sent.names) for sent in cache.log)
            assert logged == cache.logged_blocks, "miscounted"
            assert logged <= 3 * cache.capacity_blocks + 1, "the log outgrew the cache"
