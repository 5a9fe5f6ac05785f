"""What is to come in virtual time."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import attrs

Action: TypeAlias = Callable[[Any], object]


@attrs.define(eq=False)
class Agenda:
    """Actions by the time they are due; those of one time in the order they came.

    >>> agenda = Agenda()
    >>> agenda.put(2.0, print, "later")
    >>> agenda.put(1.0, print, "soon")
    >>> for at, action, argument in agenda.until(1.5):
    ...     action(argument)
    soon
    """

    _heap: list[tuple[float, int, Action, Any]] = attrs.field(factory=list, init=False)
    _order: Any = attrs.field(factory=itertools.count, init=False)

    def put(self, at: float, action: Action, argument: Any = None) -> None:
        """Have *action* called with *argument* at a time."""
        heapq.heappush(self._heap, (at, next(self._order), action, argument))

    def until(self, last: float = math.inf) -> Iterator[tuple[float, Action, Any]]:
        """Yield what is due, up to a time, and what is put there meanwhile."""
        heap = self._heap
        while heap and heap[0][0] <= last:
            at, _, action, argument = heapq.heappop(heap)
            yield at, action, argument

    def __len__(self) -> int:
        return len(self._heap)

    def has(self, action: Action) -> bool:
        """Say whether *action* is to come."""
        return any(due == action for _, _, due, _ in self._heap)

    def only(self, *actions: Action) -> bool:
        """Say whether nothing is to come but *actions*."""
        return all(due in actions for _, _, due, _ in self._heap)
