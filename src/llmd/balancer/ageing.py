"""Who is overdue, and whose turn it is among them."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from heapq import heapify, heappop, heappush
from typing import TypeAlias

import attrs

from ..types import Request, RequestId

_Line: TypeAlias = tuple[float, int, RequestId]


@attrs.define(eq=False)
class Overdue:
    """Requests that have waited too long, the longest overdue first.

    Each call is O(log n), amortised: what left is passed over.

    >>> overdue = Overdue()
    >>> overdue.add("b", 2.0), overdue.add("a", 1.0), overdue.longest()
    (None, None, 'a')
    >>> overdue.drop("a"), overdue.longest()
    (None, 'b')
    """

    _lines: dict[RequestId, _Line] = attrs.field(factory=dict, init=False)
    _heap: list[_Line] = attrs.field(factory=list, init=False)
    _added: int = attrs.field(default=0, init=False)

    def add(self, id: RequestId, due: float) -> None:
        """Note a request; one that is known already keeps its place."""
        if id in self._lines:
            return
        self._added += 1
        line = self._lines[id] = due, self._added, id
        heappush(self._heap, line)
        if len(self._heap) > 2 * len(self._lines) + 64:
            self._heap = [*self._lines.values()]
            heapify(self._heap)

    def drop(self, id: RequestId) -> None:
        """Forget a request that waits no more."""
        self._lines.pop(id, None)

    def __len__(self) -> int:
        return len(self._lines)

    def longest(self) -> RequestId | None:
        """Return the one overdue longest; None if none is."""
        heap = self._heap
        while heap:
            line = heap[0]
            if self._lines.get(line[2]) is line:
                return line[2]
            heappop(heap)
        return None


@attrs.define(eq=False)
class _Group:
    """Requests for one model."""

    waiting: int = 0
    since: int = 0
    lanes: dict[Hashable, Overdue] = attrs.field(factory=dict)
    chosen: dict[RequestId, None] = attrs.field(factory=dict)
    claims: dict[RequestId, None] = attrs.field(factory=dict)


@attrs.define(eq=False)
class Ageing:
    """Gives one dispatch in *every* to whoever is overdue longest.

    Dispatches are counted for each model, and count for those that compete with it
    for a worker.  When it is the turn of the overdue, it is that of the longest
    overdue in each lane, and the first of them to go ends it: one that cannot go
    takes nobody's turn.  Whoever is overdue as long as the one that went, or longer,
    keeps its claim until it goes.  Models are forgotten when nobody waits for them.

    Attributes:
        every: Dispatches of which one goes to an overdue request.

    >>> ageing = Ageing(every=2)
    >>> late = Request(id="late", prompt=[1])
    >>> ageing.enter(late), ageing.add(late, 1.0, ()), ageing.moved()
    (None, True, [])
    >>> ageing.sent(Request(id="other", prompt=[1]), None), ageing.moved()
    (None, ['late'])
    >>> "late" in ageing
    True
    """

    every: int
    _groups: dict[str, _Group] = attrs.field(factory=dict, init=False)
    _times: dict[RequestId, int] = attrs.field(factory=dict, init=False)
    _lane_of: dict[RequestId, Hashable] = attrs.field(factory=dict, init=False)
    _due: dict[RequestId, float] = attrs.field(factory=dict, init=False)
    _chosen: dict[RequestId, None] = attrs.field(factory=dict, init=False)
    _changed: dict[str, None] = attrs.field(factory=dict, init=False)

    def __contains__(self, id: RequestId) -> bool:
        """Say whether it is the turn of *id*."""
        return id in self._chosen

    @property
    def chosen(self) -> Collection[RequestId]:
        """Whose turn it is, one of each lane at most."""
        return self._chosen.keys()

    def enter(self, request: Request) -> None:
        """Count a request that begins to wait, perhaps here once more."""
        id, times = request.id, self._times
        if id in times:
            times[id] += 1
            return
        times[id] = 1
        group = self._groups.get(request.model)
        if group is None:
            group = self._groups[request.model] = _Group()
        group.waiting += 1

    def leave(self, request: Request) -> None:
        """Forget a request that waits no more, unless it is here once more."""
        id, model = request.id, request.model
        times = self._times.pop(id, 0)
        if times != 1:
            if times:
                self._times[id] = times - 1
            return
        group = self._groups[model]
        group.waiting -= 1
        if id in self._lane_of:
            self._drop(group, id)
            group.chosen.pop(id, None)
            group.claims.pop(id, None)
            self._chosen.pop(id, None)
            self._changed[model] = None
        if not group.waiting:
            del self._groups[model]
            self._changed.pop(model, None)

    def add(self, request: Request, due: float, lane: Hashable) -> bool:
        """Note that *request* is overdue since *due*; False if it does not wait."""
        id = request.id
        if id not in self._times:
            return False
        group = self._groups[request.model]
        if self._lane_of.get(id, lane) != lane:
            self._drop(group, id)
        self._lane_of[id], self._due[id] = lane, due
        group.lanes.setdefault(lane, Overdue()).add(id, due)
        self._changed[request.model] = None
        return True

    def sent(self, request: Request, models: Collection[str] | None) -> None:
        """Count a dispatch, before the request leaves.

        Args:
            request: Who goes.
            models: Those that compete with its own for a worker; None for all.
        """
        groups, turn = self._groups, request.id in self._chosen
        names = (
            groups if models is None else [name for name in groups if name in models]
        )
        for name in names:
            group = groups[name]
            group.since = 0 if turn else group.since + 1
            if turn:
                due, dues = self._due[request.id], self._due
                older = [
                    id for id in group.chosen if dues[id] <= due and id != request.id
                ]
                group.claims |= dict.fromkeys(older)
            if group.lanes:
                self._changed[name] = None

    def moved(self) -> list[RequestId]:
        """Choose anew; return who was chosen or is no more."""
        moved: list[RequestId] = []
        if not self._changed:
            return moved
        for name in self._changed:
            group = self._groups[name]
            chosen = dict(group.claims)
            if group.since + 1 >= self.every:
                longest = [overdue.longest() for overdue in group.lanes.values()]
                chosen |= {id: None for id in longest if id is not None}
            if chosen != group.chosen:
                both = (*group.chosen, *chosen)
                moved += [id for id in both if (id in chosen) != (id in group.chosen)]
                for id in group.chosen:
                    del self._chosen[id]
                self._chosen |= chosen
                group.chosen = chosen
        self._changed.clear()
        return moved

    def _drop(self, group: _Group, id: RequestId) -> None:
        lane = self._lane_of.pop(id, None)
        self._due.pop(id, None)
        overdue = group.lanes.get(lane)
        if overdue is not None:
            overdue.drop(id)
            if not overdue:
                del group.lanes[lane]
