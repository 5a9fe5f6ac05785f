"""An index that guesses caches from the requests that were sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import attrs

from ..types import Request, Worker, WorkerId
from ..view import Ints
from .holders import Holders, check
from .interface import PrefixIndex
from .seats import Seats


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
    stride: int
    capacity_blocks: int
    last: dict[int, _Sent] = attrs.field(factory=dict)
    log: deque[_Sent] = attrs.field(factory=deque)
    logged_blocks: int = 0

    def fits(self, worker: Worker) -> bool:
        """Say whether *worker* has blocks of this size, and as many."""
        capacity = max(worker.kv_blocks // self.stride, 1)
        same = self.block_tokens, self.capacity_blocks
        return same == (worker.block_tokens, capacity)

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
        grain_tokens: A guess is kept for one block in this many tokens, and so
            costs time and memory that much less often; at least every block.

    >>> index = GuessedIndex(grain_tokens=2)
    >>> index.join(Worker(id="a", block_tokens=2), at=0.0)
    >>> index.expect("a", Request(id="r", prompt=[1, 2, 3, 4, 5]), at=0.0)
    >>> index.match(Request(id="s", prompt=[1, 2, 9]), ["a"], at=1.0)[:, 0].tolist()
    [2]
    """

    ttl: float = 600.0
    grain_tokens: int = 64

    _seats: Seats = attrs.field(factory=Seats, init=False)
    _caches: dict[WorkerId, _Cache] = attrs.field(factory=dict, init=False)
    _holders: Holders = attrs.field(factory=Holders, init=False)
    _sizes: dict[tuple[int, int], int] = attrs.field(factory=dict, init=False)

    def join(self, worker: Worker, at: float) -> None:
        known = self._caches.get(worker.id)
        if known is not None and known.fits(worker):
            return  # restored from a dump before it joined
        if known is not None:
            self.leave(worker.id, at)
        bit = self._seats.take(worker.id)
        stride = max(self.grain_tokens // worker.block_tokens, 1)
        capacity = max(worker.kv_blocks // stride, 1)
        self._caches[worker.id] = _Cache(bit, worker.block_tokens, stride, capacity)
        self._resize()

    def match(self, request: Request, workers: Sequence[WorkerId], at: float) -> Ints:
        rows = self._seats.rows(workers)
        held = rows.nothing()
        for (block_tokens, stride), bits in self._sizes.items():
            hashes = request.hashes(block_tokens)[stride - 1 :: stride]
            self._holders.reach(hashes, bits, rows, held, block_tokens * stride)
        return held

    def expect(self, worker: WorkerId, request: Request, at: float) -> None:
        cache = self._caches.get(worker)
        if cache is None:
            return
        hashes = request.hashes(cache.block_tokens)[cache.stride - 1 :: cache.stride]
        self.sent(worker, hashes[: cache.capacity_blocks].tolist(), at)

    def sent(self, worker: WorkerId, names: list[int], at: float) -> None:
        """Note that *worker* was sent a prompt of these *names*, head first."""
        cache = self._caches[worker]
        self._holders.add(cache.bit, names)
        cache.touch(_Sent(at, names))
        self._holders.discard(cache.bit, cache.trim(at - self.ttl))

    def logs(self) -> Iterator[tuple[Worker, list[tuple[float, list[int]]]]]:
        """Yield each worker with what it was sent, oldest first."""
        for worker, cache in self._caches.items():
            kv_blocks = cache.capacity_blocks * cache.stride
            facts = Worker(
                id=worker, block_tokens=cache.block_tokens, kv_blocks=kv_blocks
            )
            yield facts, [(sent.at, [*sent.names]) for sent in cache.log]

    def forget(self, worker: WorkerId, reason: str, at: float) -> None:
        cache = self._caches.get(worker)
        if cache is not None:
            self._holders.discard(cache.bit, cache.last)
            self._caches[worker] = _Cache(
                cache.bit, cache.block_tokens, cache.stride, cache.capacity_blocks
            )

    def leave(self, worker: WorkerId, at: float) -> None:
        self.forget(worker, "left", at)
        self._caches.pop(worker, None)
        self._seats.leave(worker)
        self._resize()

    def diagnose(self, request: Request, worker: WorkerId, at: float) -> list[str]:
        cache = self._caches.get(worker)
        if cache is None:
            return ["the worker is not known here"]
        held = int(self.match(request, (worker,), at)[0, 0])
        grain = cache.block_tokens * cache.stride
        findings = [f"it holds {held} of {request.prompt_tokens} prompt tokens"]
        if request.prompt_tokens < grain:
            findings.append(
                f"the prompt has {request.prompt_tokens} tokens, under one grain of"
                f" {grain}"
            )
        elif not cache.log:
            findings.append("nothing was sent to it, or all of it expired")
        elif not held:
            findings.append(
                "no prompt that begins like this was sent to it within"
                f" {self.ttl:.3g} s, or it made room for others since"
            )
        return findings

    def _resize(self) -> None:
        """Group the workers by the size of their blocks."""
        self._sizes = {}
        for cache in self._caches.values():
            size = cache.block_tokens, cache.stride
            self._sizes[size] = self._sizes.get(size, 0) | cache.bit

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken; for tests."""
        check(self._holders, self._seats.all)
        for cache in self._caches.values():
            assert len(cache.last) <= cache.capacity_blocks, "over capacity"
            logged = sum(len(sent.names) for sent in cache.log)
            assert logged == cache.logged_blocks, "miscounted"
            assert logged <= 3 * cache.capacity_blocks + 1, "the log outgrew the cache"
