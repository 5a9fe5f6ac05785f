"""Which blocks each request holds in a worker, and what the worker tells of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as List

import attrs
import numpy as np

from .. import events as e
from ..types import Tier, Worker
from .cache import BlockCache
from .sequence import EngineSettings, Sequence


@attrs.define(eq=False)
class Residency:
    """The KV of one worker: blocks on its GPU and, behind them, in host memory.

    What the GPU drops goes to the host, if it has room for any, and what the
    host drops is gone; both drop what was used least recently.  A prompt found
    in the host is loaded and not computed.

    Attributes:
        worker: Whose.
        settings: How it caches.
        events: Where to tell of blocks stored and dropped.
        cache: Of the GPU.

    >>> from llmd import Request
    >>> events: list[e.Event] = []
    >>> held = Residency(Worker(id="w", kv_blocks=9), EngineSettings(), events)
    >>> request = Request(id="r", prompt=range(40))
    >>> sequence = Sequence(request, None, 1, request.hashes(16).tolist(), length=40)
    >>> held.admit(sequence, spare=0)
    True
    >>> held.cache.used_blocks, len(sequence.fresh)
    (3, 2)
    """

    worker: Worker
    settings: EngineSettings
    events: list[e.Event]
    cache: BlockCache = attrs.field(init=False)
    _host: OrderedDict[int, None] = attrs.field(factory=OrderedDict, init=False)

    def __attrs_post_init__(self) -> None:
        self.cache = BlockCache(self.worker.kv_blocks)

    def found(self, sequence: Sequence) -> int:
        """Count the tokens of *sequence* whose KV need not be computed."""
        if sequence.remote:
            return sequence.length - 1
        size = self.worker.block_tokens
        known = sequence.names[: (sequence.length - 1) // size]
        reuse = self.settings.prefix_caching
        return self.cache.held(known) * size if reuse else 0

    def admit(self, sequence: Sequence, spare: int) -> bool:
        """Give *sequence* blocks for its whole prompt, if there are enough.

        Args:
            sequence: Its `computed` and `loaded` say what need not be computed.
            spare: Blocks that must be left.
        """
        size, cache = self.worker.block_tokens, self.cache
        blocks = -(-sequence.length // size)
        room = cache.free_blocks - spare
        reuse = self.settings.prefix_caching
        # The last token is always computed: its logits start the answer.
        known = sequence.names[: (sequence.length - 1) // size] if reuse else []
        hits = cache.held(known)
        if blocks > room:
            idle = cache.idle_of(known[:hits])
            if blocks - hits + idle > room:
                return False
        loads = self._load(known[hits:]) if self._host else 0
        cache.pin(known[:hits])
        cache.take(blocks - hits)
        fresh = cache.label(sequence.names[hits:]) if reuse else []
        sequence.owned = known[:hits] + fresh
        sequence.fresh = fresh
        sequence.nameless = blocks - hits - len(fresh)
        sequence.loaded = loads * size
        sequence.computed = (hits + loads) * size
        if sequence.remote:
            sequence.computed = sequence.length - 1
        if sequence.cached < 0:
            sequence.cached = sequence.computed
        return True

    def drop(self, sequence: Sequence, now: float) -> None:
        """Free a prompt that is not all computed; what is stays for others.

        vLLM names blocks as their chunks are computed, and they keep their names
        when it preempts or aborts (`KVCacheManager.allocate_slots`).
        """
        reused = len(sequence.owned) - len(sequence.fresh)
        done = max(sequence.computed // self.worker.block_tokens - reused, 0)
        never = sequence.fresh[done:]
        self.cache.unlabel(never)
        sequence.nameless += len(never)
        sequence.owned = sequence.owned[: reused + done]
        sequence.fresh = sequence.fresh[:done]
        self.publish(sequence, now)
        self._release(sequence, sequence.computed)

    def free(self, sequence: Sequence) -> None:
        """Take back all blocks of *sequence*; their names stay for others."""
        self._release(sequence, sequence.length)

    def _release(self, sequence: Sequence, tokens: int) -> None:
        """Take back all blocks of *sequence*, which hold *tokens*."""
        if not sequence.blocks:
            return
        owned, nameless, spent = sequence.owned, sequence.nameless, 0
        if self.settings.prefix_caching:
            full = tokens // self.worker.block_tokens
            spent = min(max(full - len(owned), 0), nameless)
        self.cache.release(owned, nameless - spent, spent)
        sequence.owned, sequence.nameless = [], 0

    def keep_answer(self, sequence: Sequence, now: float) -> None:
        """Name the blocks of an answer, so that a next turn finds them."""
        size = self.worker.block_tokens
        names = sequence.answer_names(size)
        if names is None or not self.settings.prefix_caching:
            return
        have = len(sequence.names)
        fresh = self.cache.label(names[have : sequence.length // size].tolist())
        sequence.owned = sequence.owned + fresh
        sequence.fresh = fresh
        sequence.nameless -= len(fresh)
        self.publish(sequence, now)

    def publish(self, sequence: Sequence, now: float) -> None:
        """Tell of the blocks that *sequence* computed."""
        if sequence.fresh:
            # What had to go for them went first.
            self.publish_evicted(now)
            self._tell_stored(sequence.fresh, Tier.GPU, now)
            sequence.fresh = []

    def publish_evicted(self, now: float) -> None:
        """Tell of what was dropped, and where it went."""
        evicted = self.cache.evicted
        if not evicted:
            return
        self.cache.evicted = []
        self._tell_removed(evicted, Tier.GPU, now)
        room = self.settings.cpu_blocks
        if room:
            host = self._host
            self._tell_stored([n for n in evicted if n not in host], Tier.CPU, now)
            for name in evicted:
                host[name] = None
                host.move_to_end(name)
            excess = max(len(host) - room, 0)
            gone = [host.popitem(last=False)[0] for _ in range(excess)]
            self._tell_removed(gone, Tier.CPU, now)

    def _load(self, names: List[int]) -> int:
        """Count the leading *names* that the host holds, and touch them."""
        host, loads = self._host, 0
        for name in names:
            if name not in host:
                break
            host.move_to_end(name)
            loads += 1
        return loads

    def _tell_stored(self, names: List[int], tier: Tier, now: float) -> None:
        if names:
            hashes = np.array(names, dtype=np.uint64)
            id, size = self.worker.id, self.worker.block_tokens
            self.events.append(e.BlocksStored(now, id, hashes, size, tier))

    def _tell_removed(self, names: List[int], tier: Tier, now: float) -> None:
        if names:
            hashes = np.array(names, dtype=np.uint64)
            self.events.append(e.BlocksRemoved(now, self.worker.id, hashes, tier))
