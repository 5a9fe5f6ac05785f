"""Who has had how much: the books that fair orders keep of tenants."""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import TypeAlias

import attrs

_Line: TypeAlias = tuple[float, int, Hashable]


@attrs.define(eq=False)
class Ledger:
    """An amount for each tenant, and how many of its requests wait.

    Amounts only grow.  Each call is O(log t) for t tenants, amortised: two
    heaps hold the tenants, and what is out of date in them is passed over.
    A tenant with nothing waiting is forgotten once the least amount of those
    who wait has passed its own, since it would be lifted to that on its
    return; and of those who still are ahead, the least ahead go when more
    than *max_idle* are remembered.

    Attributes:
        max_idle: Tenants without a waiting request that are remembered.
        lifts: Whether a tenant on its return is lifted, and forgotten early.

    >>> ledger = Ledger()
    >>> ledger.open("a"), ledger.add("a", 5.0), ledger.open("b")
    (True, None, True)
    >>> ledger["a"], ledger["b"]
    (5.0, 5.0)
    """

    max_idle: int = 10_000
    lifts: bool = True
    _lines: dict[Hashable, _Line] = attrs.field(factory=dict, init=False)
    _waiting: dict[Hashable, int] = attrs.field(factory=dict, init=False)
    _open: list[_Line] = attrs.field(factory=list, init=False)
    _idle: list[_Line] = attrs.field(factory=list, init=False)
    _fresh: set[Hashable] = attrs.field(factory=set, init=False)
    _floor: float = attrs.field(default=0.0, init=False)
    _opened: int = attrs.field(default=0, init=False)

    def __getitem__(self, tenant: Hashable) -> float:
        line = self._lines.get(tenant)
        return self.floor if line is None else line[0]

    def __contains__(self, tenant: Hashable) -> bool:
        return tenant in self._lines

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def floor(self) -> float:
        """The least amount of those who wait; if none do, of the last to leave."""
        heap, lines, waiting = self._open, self._lines, self._waiting
        while heap:
            line = heap[0]
            tenant = line[2]
            if tenant in waiting and lines[tenant] is line:
                return line[0]
            heappop(heap)
        return self._floor

    def number(self, tenant: Hashable) -> int:
        """Return the place of a tenant in order of opening."""
        line = self._lines.get(tenant)
        return self._opened if line is None else line[1]

    def fresh(self, tenant: Hashable) -> bool:
        """Say whether *tenant* was charged nothing since it opened."""
        return tenant in self._fresh

    def spread(self) -> float:
        """Return the greatest less the least amount of those who wait, in O(t)."""
        amounts = [self._lines[tenant][0] for tenant in self._waiting]
        return max(amounts) - min(amounts) if amounts else 0.0

    def waiting(self, tenant: Hashable) -> int:
        """Return how many requests of *tenant* wait."""
        return self._waiting.get(tenant, 0)

    def open(self, tenant: Hashable, start: float = 0.0) -> bool:
        """Count one more waiting request; lift a tenant that had none.

        Args:
            tenant: Whose request it is.
            start: What a tenant is lifted to at least, or, if none are lifted,
                what one never seen begins with.

        Returns:
            Whether it had none.
        """
        waiting = self._waiting.get(tenant, 0)
        if waiting:
            self._waiting[tenant] = waiting + 1
            return False
        amount = max(self.floor, start) if self.lifts else start
        line = self._lines.get(tenant)
        if line is not None:
            amount = max(amount, line[0]) if self.lifts else line[0]
        self._waiting[tenant] = 1
        self._opened += 1
        self._fresh.add(tenant)
        self._write((amount, self._opened, tenant), self._open)
        return True

    def lift(self, tenant: Hashable, amount: float) -> None:
        """Lift a tenant that waits already, but has begun to compete only now."""
        amount = max(amount, self.floor)
        if self.lifts and amount > self[tenant]:
            self.set(tenant, amount)
            self._fresh.add(tenant)

    def close(self, tenant: Hashable) -> None:
        """Count one waiting request less; unknown tenants are ignored."""
        waiting = self._waiting.get(tenant, 0)
        if waiting > 1:
            self._waiting[tenant] = waiting - 1
        elif waiting:
            del self._waiting[tenant]
            self._fresh.discard(tenant)
            amount, number, _ = self._lines[tenant]
            self._floor = amount
            # A line of its own, so that the one among the open is out of date.
            self._write((amount, number, tenant), self._idle)
            self._forget()

    def add(self, tenant: Hashable, amount: float) -> None:
        """Charge *tenant*; one never seen starts at the floor."""
        self.set(tenant, self[tenant] + amount)

    def set(self, tenant: Hashable, amount: float) -> None:
        """Put down *amount*, no less than before, for *tenant*."""
        line = self._lines.get(tenant)
        if line is None:
            self._opened += 1
            number = self._opened
        else:
            number = line[1]
        if tenant in self._waiting:
            self._fresh.discard(tenant)
            self._write((amount, number, tenant), self._open)
        else:
            self._write((amount, number, tenant), self._idle)
            self._forget()

    def forget_below(self, amount: float) -> None:
        """Forget tenants without a waiting request up to *amount*."""
        while self._idle and self._idle[0][0] <= amount:
            self._pop_idle()

    def _write(self, line: _Line, heap: list[_Line]) -> None:
        self._lines[line[2]] = line
        heappush(heap, line)
        if len(heap) > 2 * len(self._lines) + 64:
            heap[:] = [each for each in heap if self._lines.get(each[2]) is each]
            heapify(heap)

    def _forget(self) -> None:
        if self.lifts and self._waiting:
            self.forget_below(self.floor)
        while len(self._lines) - len(self._waiting) > self.max_idle:
            self._pop_idle()

    def _pop_idle(self) -> None:
        line = heappop(self._idle)
        tenant = line[2]
        if self._lines.get(tenant) is line and tenant not in self._waiting:
            del self._lines[tenant]
