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
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from ..hashing import Hashes
from ..native import loops
from ..view import Ints
from .seats import Rows

_SWEEP = 4
_ENDS_KEPT = 1 << 10
_INTERNED = 1 << 14
_LOG_SPARE = 1 << 12
_ALL = 1 << 40


@attrs.define(eq=False)
class PlainHolders:
    """Sets of workers, as bit masks, by prefix name: what is meant, in Python.

    Memory: about 90 bytes a name held (dict slot, key and, for uncommon sets of
    workers, the mask), whatever the number of holders.
    """

    _masks: dict[int, int] = attrs.field(factory=dict, init=False)
    _shared: dict[int, int] = attrs.field(factory=dict, init=False)
    # Several workers share a system prompt, whose end is where it was last time.
    _ends: dict[int, int] = attrs.field(factory=dict, init=False)

    def __len__(self) -> int:
        return len(self._masks)

    def add(self, bit: int, names: Sequence[int] | Hashes) -> bytes:
        """Let the worker *bit* hold *names*, O(names).

        Returns:
            What is new to it, 8 bytes a name.
        """
        masks, shared = self._masks, self._shared
        new = array("Q")
        for name in names.tolist() if isinstance(names, np.ndarray) else names:
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
        return new.tobytes()

    def discard(self, bit: int, names: Iterable[int] | Hashes) -> None:
        """Let *bit* hold *names* no more; unknown names are ignored."""
        masks = self._masks
        keep = ~bit
        for name in names.tolist() if isinstance(names, np.ndarray) else names:
            old = masks.get(name)
            if old is None:
                continue
            if left := old & keep:
                masks[name] = left
            else:
                del masks[name]

    def kept(self, bit: int, names: Iterable[int]) -> bytes:
        """Return those of *names*, each once, that *bit* holds, 8 bytes a name."""
        find = self._masks.get
        held = [name for name in dict.fromkeys(names) if find(name, 0) & bit]
        return array("Q", held).tobytes()

    def find(self, name: int, default: int) -> int:
        """Return who holds *name*, as `dict.get` does."""
        return self._masks.get(name, default)

    def depths(
        self, names: Hashes, alive: int, others: tuple[PlainHolders, ...] = ()
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

    def reach(
        self,
        names: Hashes,
        alive: int,
        rows: Rows,
        held: Ints,
        worth: int,
        *,
        fine: int = _ALL,
        tier: int = 0,
        others: tuple[Any, ...] = (),
    ) -> None:
        """Raise in *held* what workers hold to what is found here.

        Args:
            names: Shape (n,), each a prefix of the next.
            alive: The workers to look at.
            rows: Where they stand in *held*.
            held: Tokens, shape (W, tiers).
            worth: Tokens of a name.
            fine: Names from the first on that are worth that; further ones are
                worth *fine* times as much each.
            tier: The first column to raise.
            others: Stores that count as one with this one.
        """
        for mask, depth in self.depths(names, alive, others):
            coarse = max(depth - fine, 0)
            tokens = worth * (depth - coarse + coarse * fine)
            place = rows.pick(mask)
            held[place, tier:] = np.maximum(held[place, tier:], tokens)

    def items(self) -> Iterable[tuple[int, int]]:
        """Return (name, holders) pairs, the oldest first."""
        return self._masks.items()

    def trim(self, blocks: int) -> None:
        """Drop the oldest names until *blocks* are left, O(all of them)."""
        names = [*itertools.islice(self._masks, len(self._masks) - blocks)]
        for name in names:
            del self._masks[name]

    def _finder(self, others: tuple[PlainHolders, ...]) -> Callable[[int, int], int]:
        if not others:
            return self._masks.get
        gets = [store._masks.get for store in (self, *others)]

        def find(name: int, default: int) -> int:
            mask = default
            for get in gets:
                mask |= get(name, 0)
            return mask

        return find


if TYPE_CHECKING or loops is None:
    Holders = PlainHolders
else:

    class Holders(loops.Table):
        """`PlainHolders` in C, at a quarter of the memory: `native/loops.c`."""

        __slots__ = ()

        def reach(
            self, names, alive, rows, held, worth, *, fine=_ALL, tier=0, others=()
        ) -> None:
            self.raise_to(names, alive, others, held, rows.view, worth, fine, tier)

        def __reduce__(self):
            known = attrs.fields(type(self)) if attrs.has(type(self)) else ()
            fields = {field.name: getattr(self, field.name) for field in known}
            return _restored, (type(self), self.state(), fields)


def _restored(kind: type[Any], state: Any, fields: dict[str, Any]) -> Any:
    twin = kind()
    twin.restore(state)
    for name, value in fields.items():
        setattr(twin, name, value)
    return twin


def check(holders: Holders, known: int) -> None:
    """Raise AssertionError if a set is empty or names others than *known*."""
    for _, mask in holders.items():  # noqa: PERF102
        assert mask, "an empty set is kept"
        assert not mask & ~known, "a stranger holds a block"


@attrs.define(eq=False)
class LoggedHolders(Holders):
    """Holders that can drop a worker: a log says what each has been given.

    The log takes 8 to 16 bytes a block and worker.  A worker is dropped at
    once, by its bit being `dead`; what it held is swept up behind it, in time
    proportional to that, by the calls that store.
    """

    _logs: dict[int, array[int]] = attrs.field(factory=dict, init=False)
    # Worker's bit -> length at which its log is gone through next.
    _longest: dict[int, int] = attrs.field(factory=dict, init=False)
    _dead: int = attrs.field(default=0, init=False)
    _unswept: deque[tuple[int, Iterator[int]]] = attrs.field(factory=deque, init=False)

    @property
    def dead(self) -> int:
        """Bits that were cleared but not yet swept from every set."""
        return self._dead

    def add(self, bit: int, names: Sequence[int] | Hashes) -> bytes:
        new = Holders.add(self, bit, names)
        log = self._logs.get(bit)
        if log is None:
            log = self._logs[bit] = array("Q")
            self._longest[bit] = _LOG_SPARE
        log.frombytes(new)
        if len(log) > self._longest[bit]:
            self._shorten(bit, log)
        if self._dead:
            self.sweep(_SWEEP * len(names))
        return new

    def drop(self, bit: int, names: Sequence[int] | Hashes) -> None:
        """Let *bit* hold *names* no more."""
        self.discard(bit, names)

    def names(self, bit: int) -> Iterator[int]:
        """Yield what the worker *bit* holds, oldest first."""
        log = self._logs.get(bit)
        if log:
            yield from array("Q", self.kept(bit, log))

    def _shorten(self, bit: int, log: array[int]) -> None:
        """Leave out what is held no more; amortised, as the log has doubled."""
        kept = array("Q", self.kept(bit, log))
        self._logs[bit] = kept
        self._longest[bit] = 2 * len(kept) + _LOG_SPARE

    def clear(self, bit: int) -> None:
        """Let *bit* hold nothing, in O(1): later calls sweep up behind it.

        *bit* must not be used again before it leaves `dead`.
        """
        log = self._logs.pop(bit, None)
        self._longest.pop(bit, None)
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
        """Raise AssertionError if an invariant is broken; for tests."""
        check(self, known | self._dead)
        for bit in self._logs:
            held = {name for name, mask in self.items() if mask & bit}
            assert held == {*self.names(bit)}, "the log has forgotten a block"
