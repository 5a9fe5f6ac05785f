"""Who has had how much: the books that fair orders keep of tenants."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeAlias

import attrs
from sortedcontainers import SortedList

_Line: TypeAlias = tuple[float, int, Hashable]


@attrs.define(eq=False)
class Ledger:
    """An amount for each tenant, and how many of its requests wait.

    Each call is O(log t) for t tenants.  A tenant with nothing waiting is
    forgotten once the least amount of those who wait has passed its own,
    since it would be lifted to that on its return; and of those who still
    are ahead, the least ahead go when more than *max_idle* are remembered.

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
    _open: Any = attrs.field(factory=SortedList, init=False)
    _idle: Any = attrs.field(factory=SortedList, init=False)
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
        return self._open[0][0] if self._open else self._floor

    def number(self, tenant: Hashable) -> int:
        """Return the place of a tenant in order of opening."""
        line = self._lines.get(tenant)
        return self._opened if line is None else line[1]

    def spread(self) -> float:
        """Return the greatest less the least amount of those who wait."""
        return self._open[-1][0] - self._open[0][0] if self._open else 0.0

    def waiting(self, tenant: Hashable) -> int:
        """Return how many requests of *tenant* wait."""
        return self._waiting.get(tenant, 0)

    def open(self, tenant: Hashable, start: float = 0.0) -> bool:
        """Count one more waiting request; lift a tenant that had none.

        Args:
            tenant: Whose request it is.
            start: What a tenant never seen begins with, if none are lifted.

        Returns:
            Whether it had none.
        """
        waiting = self._waiting.get(tenant, 0)
        self._waiting[tenant] = waiting + 1
        if waiting:
            return False
        line = self._lines.pop(tenant, None)
        amount = self.floor if self.lifts else start
        if line is not None:
            self._idle.remove(line)
            amount = max(amount, line[0]) if self.lifts else line[0]
        self._opened += 1
        self._lines[tenant] = line = (amount, self._opened, tenant)
        self._open.add(line)
        return True

    def close(self, tenant: Hashable) -> None:
        """Count one waiting request less; unknown tenants are ignored."""
        waiting = self._waiting.get(tenant, 0)
        if waiting > 1:
            self._waiting[tenant] = waiting - 1
        elif waiting:
            del self._waiting[tenant]
            line = self._lines[tenant]
            self._open.remove(line)
            self._idle.add(line)
            self._floor = line[0]
            self._forget()

    def add(self, tenant: Hashable, amount: float) -> None:
        """Charge *tenant*; one never seen starts at the floor."""
        self.set(tenant, self[tenant] + amount)

    def set(self, tenant: Hashable, amount: float) -> None:
        """Put down *amount* for *tenant*."""
        line = self._lines.get(tenant)
        lines = self._open if tenant in self._waiting else self._idle
        if line is None:
            self._opened += 1
            number = self._opened
        else:
            number = line[1]
            lines.remove(line)
        self._lines[tenant] = line = (amount, number, tenant)
        lines.add(line)
        self._forget()

    def forget_below(self, amount: float) -> None:
        """Forget tenants without a waiting request up to *amount*."""
        while self._idle and self._idle[0][0] <= amount:
            del self._lines[self._idle.pop(0)[2]]

    def _forget(self) -> None:
        if self._open and self.lifts:
            self.forget_below(self._open[0][0])
        while len(self._idle) > self.max_idle:
            del self._lines[self._idle.pop(0)[2]]
