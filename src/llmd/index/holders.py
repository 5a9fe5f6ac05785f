"""The one store under every index: from a prefix name to a set of workers.

A name stands for a whole prefix, so a dict is enough and no tree is needed.
Workers are bits of an int.  Whoever holds a prefix holds all shorter ones, as
engines free from the tail: the set of holders only shrinks along a prompt,
and the depth of every worker is found by bisection.
"""

from __future__ import annotations

import itertools
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import attrs

from ..blocks import Hashes

_SWEEP = 4
_ENDS_KEPT = 1 << 10
_INTERNED = 1 << 14
_LOG_SPARE = 1 << 12


@attrs.define(eq=False)
class Holders:
    """Sets of workers, as bit masks, by prefix name.

    Memory: about 90 bytes a name held (dict slot, key and, for uncommon sets of
    workers, the mask), whatever the number of holders.
    """

    _masks: dict[int, int] = attrs.field(factory=dict, init=False)
    _shared: dict[int, int] = attrs.field(factory=dict, init=False)
    # Several workers share a system prompt, whose end is where it was last time.
    _ends: dict[int, int] = attrs.field(factory=dict, init=False)

    def __len__(self) -> int:
        return len(self._masks)

    def add(self, bit: int, names: Sequence[int]) -> Sequence[int]:
        """Let the worker *bit* hold *names*, O(names); return what is new to it.

        Names that nobody holds yet go in at the speed of C.
        """
        masks = self._masks
        if names and names[0] not in masks and masks.keys().isdisjoint(names):
            masks.update(dict.fromkeys(names, bit))
            return names
        shared, new = self._shared, []
        for name in names:
            old = masks.get(name)
            if old is None:
                masks[name] = bit
                new.append(name)
            elif not old & bit:
                mask = old | bit
                masks[name] = shared.setdefault(mask, mask)
                new.append(name)
        if len(shared) > _INTERNED:
            shared.clear()
        return new

    def discard(self, bit: int, names: Iterable[int]) -> None:
        """Let *bit* hold *names* no more; unknown names are ignored."""
        masks = self._masks
        keep = ~bit
        for name in names:
            old = masks.get(name)
            if old is None:
                continue
            if left := old & keep:
                masks[name] = left
            else:
                del masks[name]

    def find(self, name: int, default: int) -> int:
        """Return who holds *name*, as `dict.get` does."""
        return self._masks.get(name, default)

    def depths(
        self, names: Hashes, alive: int, others: tuple[Holders, ...] = ()
    ) -> list[tuple[int, int]]:
        """Group the workers of *alive* by how many leading *names* they hold.

        Args:
            names: Shape (n,), each a prefix of the next.
            alive: The workers to look at.
            others: Stores that count as one with this one.

        Returns:
            (workers, depth) pairs with depth at least 1, shallowest first,
            each worker in one at most.  O(distinct depths * log n) look-ups.
        """
        found: list[tuple[int, int]] = []
        blocks = len(names)
        if not blocks:
            return found
        item = names.item
        find = self._finder(others)
        ends = self._ends
        at = find(item(0), 0) & alive
        low, high = 0, blocks - 1
        right = find(item(high), 0) & at
        ahead = []  # what was looked at to the right of *high*, nearest last
        while at:
            hint = ends.get(at, -1)
            while at != right and high - low > 1:
                if low < hint < high:
                    middle = hint
                elif low == hint:
                    middle, hint = low + 1, -1
                else:
                    middle = (low + high) >> 1
                mask = find(item(middle), 0) & at
                if mask == at:
                    low = middle
                else:
                    ahead.append((high, right))
                    high, right = middle, mask
            if at != right:
                found.append((at & ~right, low + 1))
                if at & (at - 1):
                    ends[at] = low
                at = right
            low = high
            if not ahead:
                break
            high, right = ahead.pop()
            right &= at
        if at:
            found.append((at, blocks))
        if len(ends) > _ENDS_KEPT:
            ends.clear()
        return found

    def trim(self, blocks: int) -> None:
        """Drop the oldest names until *blocks* are left, O(all of them)."""
        names = [*itertools.islice(self._masks, len(self._masks) - blocks)]
        for name in names:
            del self._masks[name]

    def check(self, known: int) -> None:
        """Raise AssertionError if a set is empty or names strangers."""
        for mask in self._masks.values():
            assert mask, "an empty set is kept"
            assert not mask & ~known, "a stranger holds a block"

    def _finder(self, others: tuple[Holders, ...]) -> Callable[[int, int], int]:
        if not others:
            return self._masks.get
        gets = [store._masks.get for store in (self, *others)]

        def find(name: int, default: int) -> int:
            mask = default
            for get in gets:
                mask |= get(name, 0)
            return mask

        return find


@attrs.define(eq=False)
class LoggedHolders(Holders):
    """Holders that can drop a worker: a log says what each has been given.

    The log takes 8 to 24 bytes a block and worker.  A worker is dropped at
    once, by its bit being `dead`; what it held is swept up behind it, in time
    proportional to that, by the calls that store.
    """

    _logs: dict[int, array[int]] = attrs.field(factory=dict, init=False)
    _gone: dict[int, int] = attrs.field(factory=dict, init=False)
    _dead: int = attrs.field(default=0, init=False)
    _unswept: deque[tuple[int, Iterator[int]]] = attrs.field(factory=deque, init=False)

    @property
    def dead(self) -> int:
        """Bits that were cleared but not yet swept from every set."""
        return self._dead

    def add(self, bit: int, names: Sequence[int]) -> Sequence[int]:
        new = Holders.add(self, bit, names)
        log = self._logs.get(bit)
        if log is None:
            log = self._logs[bit] = array("Q")
        log.extend(new)
        if self._dead:
            self.sweep(_SWEEP * len(names))
        return new

    def drop(self, bit: int, names: Sequence[int]) -> None:
        """Let *bit* hold *names* no more, and its log shrink now and then."""
        self.discard(bit, names)
        log = self._logs.get(bit)
        if log is not None:
            gone = self._gone[bit] = self._gone.get(bit, 0) + len(names)
            if gone > len(log) // 2 + _LOG_SPARE:
                self._logs[bit] = array("Q", self.names(bit))
                self._gone[bit] = 0

    def names(self, bit: int) -> Iterator[int]:
        """Yield what the worker *bit* holds, oldest first."""
        masks = self._masks
        for name in dict.fromkeys(self._logs.get(bit, ())):
            if masks.get(name, 0) & bit:
                yield name

    def clear(self, bit: int) -> None:
        """Let *bit* hold nothing, in O(1): later calls sweep up behind it.

        *bit* must not be used again before it leaves `dead`.
        """
        log = self._logs.pop(bit, None)
        self._gone.pop(bit, None)
        if log:
            self._dead |= bit
            self._unswept.append((bit, iter(log)))

    def sweep(self, steps: int) -> None:
        """Take dead bits out of up to *steps* sets."""
        while self._unswept and steps > 0:
            bit, names = self._unswept[0]
            part = [*itertools.islice(names, steps)]
            self.discard(bit, part)
            if len(part) < steps:
                self._unswept.popleft()
                self._dead &= ~bit
            steps -= len(part)

    def check(self, known: int) -> None:
        Holders.check(self, known | self._dead)
        for bit in self._logs:
            held = {name for name, mask in self._masks.items() if mask & bit}
            assert held == {*self.names(bit)}, "the log has forgotten a block"
