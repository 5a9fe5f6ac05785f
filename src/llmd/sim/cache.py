"""A paged KV cache with prefix reuse, as vLLM keeps it.

Blocks in use are counted; blocks that nobody uses stay, by name, until their
place is needed, least recently used first.  A request gives its blocks back
tail first, so that the end of a prompt goes before its beginning (vLLM,
`v1/core/kv_cache_manager.py` and `block_pool.py`).  Only full blocks have
names; one without, the last of a request, is the first to be taken again
(`BlockPool.free_blocks`, vLLM 0.32).  A block computed twice at once is kept once
by name; its copy is nameless.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import attrs


@attrs.define(eq=False)
class BlockCache:
    """The blocks of one worker; every call is O(blocks it names).

    Attributes:
        capacity_blocks: Blocks in all.
        evicted: Names dropped since somebody last emptied this list.

    >>> cache = BlockCache(capacity_blocks=4)
    >>> cache.take(3)
    >>> cache.label([11, 12, 13])
    [11, 12, 13]
    >>> cache.release([11, 12, 13])
    >>> cache.take(2)
    >>> cache.held([11, 12, 13]), cache.evicted
    (2, [13])
    """

    capacity_blocks: int
    evicted: list[int] = attrs.field(factory=list, init=False)
    _uses: dict[int, int] = attrs.field(factory=dict, init=False)
    _nameless: int = attrs.field(default=0, init=False)
    # Names, and runs of spent blocks under negative keys, oldest first.
    _idle: OrderedDict[int, int] = attrs.field(factory=OrderedDict, init=False)
    _idle_blocks: int = attrs.field(default=0, init=False)
    _runs: int = attrs.field(default=0, init=False)

    @property
    def used_blocks(self) -> int:
        """Blocks that running requests hold."""
        return len(self._uses) + self._nameless

    @property
    def free_blocks(self) -> int:
        """Blocks that can be taken, those that would lose a name included."""
        return self.capacity_blocks - len(self._uses) - self._nameless

    def held(self, names: Sequence[int]) -> int:
        """Count the leading *names* that are here, in O(log names).

        Bisection is right because of two prefixes the longer always goes
        first.
        """
        uses, idle = self._uses, self._idle
        low, high = 0, len(names)
        while low < high:
            middle = (low + high) >> 1
            name = names[middle]
            if name in uses or name in idle:
                low = middle + 1
            else:
                high = middle
        return low

    def names(self) -> set[int]:
        """Return every name that is here."""
        return self._uses.keys() | {name for name in self._idle if name >= 0}

    def idle_of(self, names: Sequence[int]) -> int:
        """Count those of *names* that are here and that nobody uses."""
        idle = self._idle
        return sum([name in idle for name in names])

    def pin(self, names: Sequence[int]) -> None:
        """Use *names*, all held."""
        uses, idle = self._uses, self._idle
        for name in names:
            if name in uses:
                uses[name] += 1
            else:
                del idle[name]
                self._idle_blocks -= 1
                uses[name] = 1

    def take(self, blocks: int) -> None:
        """Use *blocks* nameless ones, at most `free_blocks`."""
        short = blocks - (self.free_blocks - self._idle_blocks)
        if short > 0:
            self._evict(short)
        self._nameless += blocks

    def label(self, names: Sequence[int]) -> list[int]:
        """Name as many nameless blocks in use; return what was not here yet."""
        uses, idle = self._uses, self._idle
        new = [name for name in names if name not in uses and name not in idle]
        for name in new:
            uses[name] = 1
        self._nameless -= len(new)
        return new

    def unlabel(self, names: Sequence[int]) -> None:
        """Take back names given by `label` whose content was never computed."""
        for name in names:
            del self._uses[name]
        self._nameless += len(names)

    def release(self, names: Sequence[int], blank: int = 0, spent: int = 0) -> None:
        """Stop using blocks, tail first.

        Args:
            names: Head first.
            blank: Nameless ones that are not full, to be taken first.
            spent: Nameless ones that are, behind *names*: an engine has names for
                them, by which nobody will ask.
        """
        uses, idle = self._uses, self._idle
        self._nameless -= blank + spent
        if spent:
            self._runs += 1
            idle[-self._runs] = spent
            self._idle_blocks += spent
        for name in reversed(names):
            left = uses[name] - 1
            if left:
                uses[name] = left
            else:
                del uses[name]
                idle[name] = 1
                self._idle_blocks += 1

    def drop(self) -> None:
        """Forget every name that nobody uses."""
        self.evicted += [name for name in self._idle if name >= 0]
        self._idle.clear()
        self._idle_blocks = 0

    def _evict(self, blocks: int) -> None:
        idle, evicted = self._idle, self.evicted
        self._idle_blocks -= blocks
        while blocks > 0:
            name, size = idle.popitem(last=False)
            if name >= 0:
                evicted.append(name)
                blocks -= 1
            elif size > blocks:
                idle[name] = size - blocks
                idle.move_to_end(name, last=False)
                return
            else:
                blocks -= size

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken; for tests."""
        assert self._nameless >= 0, "more names than blocks"
        assert sum(self._idle.values()) == self._idle_blocks, "miscounted"
        assert not self._uses.keys() & self._idle.keys(), "used and idle at once"
        assert all(uses > 0 for uses in self._uses.values()), "used by nobody"
        assert self.used_blocks + self._idle_blocks <= self.capacity_blocks, "overfull"
