"""When the places of requests that wait are to be asked for again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from heapq import heapify, heappop, heappush
from typing import TypeAlias

import attrs

from .lane import Entry
from .types import RequestId

_Alarm: TypeAlias = tuple[float, int, RequestId]


@attrs.define(eq=False)
class Alarms:
    """The times at which entries say that their place may change.

    Each call is O(log n), amortised.  Most entries leave before, and their alarms
    stay until they are on top or too many.

    Attributes:
        entries: Those that wait, as they wait now.

    >>> from .types import Request
    >>> entry = Entry(Request(id="r", prompt=[1]), (), 0.0, 0, 1, until=5.0)
    >>> alarms = Alarms({"r": entry})
    >>> alarms.set(entry)
    >>> alarms.next_at, alarms.due(4.0), alarms.due(5.0), alarms.next_at
    (5.0, [], ['r'], inf)
    """

    entries: Mapping[RequestId, Entry]
    _heap: list[_Alarm] = attrs.field(factory=list, init=False)

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def next_at(self) -> float:
        """When the next is due, at the latest; infinity for never."""
        return self._heap[0][0] if self._heap else math.inf

    def set(self, entry: Entry) -> None:
        """Have the place of an entry asked for again."""
        if len(self._heap) > 2 * len(self.entries) + 64:
            self._heap = [alarm for alarm in self._heap if self._rings(alarm)]
            heapify(self._heap)
        heappush(self._heap, (entry.until, entry.number, entry.request.id))

    def due(self, now: float) -> list[RequestId]:
        """Return whose place is to be asked for again by *now*, and forget them."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            alarm = heappop(self._heap)
            if self._rings(alarm):
                due.append(alarm[2])
        return due

    def clear(self) -> None:
        """Forget all."""
        self._heap.clear()

    def _rings(self, alarm: _Alarm) -> bool:
        """Say whether an alarm is that of a request as it waits now."""
        until, number, id = alarm
        entry = self.entries.get(id)
        return entry is not None and (entry.until, entry.number) == (until, number)
