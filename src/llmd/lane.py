"""A lane of waiting requests: flows in order of turn, each in order of key."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
from sortedcontainers import SortedList

from .types import Request, WorkerId

if TYPE_CHECKING:
    from .balancer.interface import Place

Rank: TypeAlias = tuple[Any, Any, int]
_Head: TypeAlias = tuple[Any, Any, int, Hashable]


@attrs.define(eq=False)
class Entry:
    """A request that waits, and where it is filed.

    Attributes:
        request: It.
        group: What keeps it apart from others, whatever the balancer says.
        since: When it arrived, seconds.
        attempts: Dispatches of it that failed.
        failed_on: Workers on which they did.
        generated_tokens: Of its answer, before it was taken off a worker.
        again: It was dispatched before.
        number: Breaks ties of keys; unique, smaller goes first.
        key: As in `Place`, like what follows.
        flow: Where its turn is decided.
        lane: The group and the lane of its place.
        until: When to ask for its place again, seconds.
        filed: Whether it is in its lane.
    """

    request: Request
    group: tuple[Hashable, ...]
    since: float
    attempts: int
    number: int
    failed_on: frozenset[WorkerId] = frozenset()
    generated_tokens: int = 0
    again: bool = False
    key: Any = None
    flow: Hashable = ""
    lane: tuple[Hashable, Hashable] = ((), ())
    until: float = math.inf
    filed: bool = False

    def move(self, place: Place) -> None:
        """Take over what *place* says."""
        self.key, self.flow, self.until = place.key, place.flow, place.until
        self.lane = (self.group, place.lane)


@attrs.define(eq=False)
class Lane:
    """Entries by (turn of the flow, key, number).

    Each change is O(log n) for n entries, and moves at most a pointer a flow:
    of those there are few enough for a plain list to be faster than a sorted one.
    """

    _flows: dict[Hashable, Any] = attrs.field(factory=dict, init=False)
    _head_of: dict[Hashable, _Head] = attrs.field(factory=dict, init=False)
    _heads: list[_Head] = attrs.field(factory=list, init=False)

    @property
    def head(self) -> Rank:
        """The rank of the first; a lane in use is never empty."""
        turn, key, number, _ = self._heads[0]
        return turn, key, number

    @property
    def first(self) -> Entry:
        """The entry that is next."""
        return self.first_of(self._heads[0][3])

    def first_of(self, flow: Hashable) -> Entry:
        """Return the next entry of a flow."""
        entry: Entry = self._flows[flow][0][2]
        return entry

    def put(self, entry: Entry, turn: Any) -> None:
        """File a entry; *turn* is now that of its flow.

        Raises:
            TypeError: Its key or turn compares with no other; nothing changed.
        """
        queue = self._flows.get(entry.flow)
        item = (entry.key, entry.number, entry)
        if queue is None:
            self._flows[entry.flow] = queue = SortedList()
        try:
            queue.add(item)
            self._lead(entry.flow, turn)
        except BaseException:
            queue.discard(item)
            if not queue:
                del self._flows[entry.flow]
            raise

    def take(self, entry: Entry) -> bool:
        """Take a entry out and say whether its flow has others left."""
        flow = entry.flow
        queue = self._flows[flow]
        queue.remove((entry.key, entry.number, entry))
        if queue:
            self._lead(flow, self._head_of[flow][0])
            return True
        del self._flows[flow]
        self._forget(self._head_of.pop(flow))
        return False

    def turn(self, flow: Hashable, turn: Any) -> None:
        """Change the turn of a flow."""
        self._lead(flow, turn)

    def __bool__(self) -> bool:
        return bool(self._flows)

    def __iter__(self) -> Iterator[Request]:
        for _, _, _, flow in self._heads:
            for _, _, entry in self._flows[flow]:
                yield entry.request

    def _lead(self, flow: Hashable, turn: Any) -> None:
        """Put the first of a flow among the heads."""
        key, number, _ = self._flows[flow][0]
        old = self._head_of.get(flow)
        if old is not None and old[2] == number and old[0] == turn and old[1] == key:
            return
        new = (turn, key, number, flow)
        insort(self._heads, new)
        if old is not None:
            self._forget(old)
        self._head_of[flow] = new

    def _forget(self, head: _Head) -> None:
        del self._heads[bisect_left(self._heads, head)]
