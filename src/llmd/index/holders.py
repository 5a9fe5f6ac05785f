"""The one store under every index: from a prefix name to a set of workers.

A name stands for a whole prefix, so a dict is enough and no tree is needed.
Workers are bits of an int.  Whoever holds a prefix holds all shorter ones, as
engines free from the tail: the set of holders only shrinks along a prompt,
and the depth of every worker is found by bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import attrs

from ..blocks import Hashes

_SWEEP = 4
_ENDS_KEPT = 1 << 10
_INTERNED = 1 << 14


@attrs.define(eq=False)
class Holders:
    """Sets of workers, as bit masks, by prefix name.

    Memory: about 100 bytes a name held (dict slot, key and, for uncommon sets
    of workers, the mask), whatever the number of holders.
    """

    _masks: dict[int, int] = attrs.field(factory=dict, init=False)
    _dead: int = attrs.field(default=0, init=False)
    _sweeping: int = attrs.field(default=0, init=False)
    _unswept: Iterator[int] = attrs.field(factory=lambda: iter(()), init=False)
    _shared: dict[int, int] = attrs.field(factory=dict, init=False)
    # Several workers share a system prompt, whose end is where it was last time.
    _ends: dict[int, int] = attrs.field(factory=dict, init=False)

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def dead(self) -> int:
        """Bits that were cleared but not yet swept from every set."""
        return self._dead

    def add(self, bit: int, names: Sequence[int]) -> None:
        """Let the worker *bit* hold *names*, O(names).

        Names that nobody holds yet go in at the speed of C.
        """
        masks = self._masks
        if names and names[0] not in masks and masks.keys().isdisjoint(names):
            masks.update(dict.fromkeys(names, bit))
        else:
            shared = self._shared
            for name in names:
                old = masks.get(name)
                if old is None:
                    masks[name] = bit
                elif not old & bit:
                    mask = old | bit
                    masks[name] = shared.setdefault(mask, mask)
            if len(shared) > _INTERNED:
                shared.clear()
        if self._dead:
            self.sweep(_SWEEP * len(names))

    def discard(self, bit: int, names: Iterable[int]) -> None:
        """Let *bit* hold *names* no more; unknown names are ignored."""
        masks = self._masks
        keep = ~(bit | self._dead)
        for name in names:
            old = masks.get(name)
            if old is None:
                continue
            if left := old & keep:
                masks[name] = left
            else:
                del masks[name]

    def clear(self, bit: int) -> None:
        """Let *bit* hold nothing, in O(1): later calls sweep up behind it.

        *bit* must not be used again before it leaves `dead`.
        """
        if self._masks:
            self._dead |= bit

    def get(self, name: int) -> int:
        """Return who holds *name*."""
        return self._masks.get(name, 0) & ~self._dead

    def items(self) -> Iterator[tuple[int, int]]:
        """Yield each name with who holds it."""
        alive = ~self._dead
        for name, mask in self._masks.items():
            if mask & alive:
                yield name, mask & alive

    def depth(self, names: Hashes, bits: int) -> int:
        """Return how many leading *names* anyone of *bits* holds, O(log n)."""
        find, item, bits = self._masks.get, names.item, bits & ~self._dead
        low, high = 0, len(names)
        while low < high:
            middle = (low + high) >> 1
            if find(item(middle), 0) & bits:
                low = middle + 1
            else:
                high = middle
        return low

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

    def sweep(self, steps: int) -> None:
        """Take dead bits out of up to *steps* sets."""
        masks = self._masks
        if not self._sweeping:
            self._sweeping = self._dead
            self._unswept = iter(list(masks))
        keep = ~self._sweeping
        for _ in range(steps):
            name = next(self._unswept, None)
            if name is None:
                self._dead &= keep
                self._sweeping = 0
                return
            old = masks.get(name, 0)
            if old and old & ~keep:
                if left := old & keep:
                    masks[name] = left
                else:
                    del masks[name]

    def check(self, known: int) -> None:
        """Raise AssertionError if a set is empty or names strangers."""
        for mask in self._masks.values():
            assert mask, "an empty set is kept"
            assert not mask & ~(known | self._dead), "a stranger holds a block"
