"""Who is overdue, and whose turn it is among them."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
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
    """Requests that the same workers could serve, by model and adapter."""

    waiting: int = 0
    since: int = 0
    chosen: RequestId | None = None
    overdue: Overdue = attrs.field(factory=Overdue)


@attrs.define(eq=False)
class Ageing:
    """Gives one dispatch in *every* to whoever is overdue longest.

    Each model and adapter counts for itself, so that one whose workers are busy
    or gone does not take the turn of the others.  Groups are forgotten when
    nobody of them waits.

    Attributes:
        every: Dispatches of which one goes to an overdue request.

    >>> ageing = Ageing(every=2)
    >>> late = Request(id="late", prompt=[1])
    >>> ageing.enter(late), ageing.add(late, 1.0), ageing.moved()
    (None, True, [])
    >>> ageing.sent(Request(id="other", prompt=[1])), ageing.moved(), "late" in ageing
    (None, ['late'], True)
    """

    every: int
    _groups: dict[Hashable, _Group] = attrs.field(factory=dict, init=False)
    _chosen: dict[RequestId, None] = attrs.field(factory=dict, init=False)
    _changed: dict[Hashable, None] = attrs.field(factory=dict, init=False)

    def __contains__(self, id: RequestId) -> bool:
        """Say whether it is the turn of *id*."""
        return id in self._chosen

    @property
    def chosen(self) -> Collection[RequestId]:
        """Whose turn it is, one of each group at most."""
        return self._chosen.keys()

    def enter(self, request: Request) -> None:
        """Count a request that begins to wait."""
        name = _group_of(request)
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Group()
        group.waiting += 1

    def leave(self, request: Request) -> None:
        """Forget a request that waits no more."""
        name = _group_of(request)
        group = self._groups.get(name)
        if group is None:
            return
        group.waiting -= 1
        group.overdue.drop(request.id)
        if group.chosen == request.id:
            del self._chosen[request.id]
            group.chosen = None
        if group.waiting > 0:
            self._changed[name] = None
        else:
            del self._groups[name]
            self._changed.pop(name, None)

    def add(self, request: Request, due: float) -> bool:
        """Note that *request* is overdue since *due*; False if it does not wait."""
        name = _group_of(request)
        group = self._groups.get(name)
        if group is None:
            return False
        group.overdue.add(request.id, due)
        self._changed[name] = None
        return True

    def sent(self, request: Request) -> None:
        """Count a dispatch, before the request leaves."""
        name = _group_of(request)
        group = self._groups.get(name)
        if group is not None:
            group.since = 0 if request.id == group.chosen else group.since + 1
            self._changed[name] = None

    def moved(self) -> Iterable[RequestId]:
        """Choose anew; return who was chosen or is no more."""
        if not self._changed:
            return ()
        moved: list[RequestId] = []
        for name in self._changed:
            group = self._groups[name]
            turn = group.since + 1 >= self.every
            chosen = group.overdue.longest() if turn else None
            if chosen == group.chosen:
                continue
            for id in (group.chosen, chosen):
                if id is not None:
                    moved.append(id)
                    self._chosen.pop(id, None)
            group.chosen = chosen
            if chosen is not None:
                self._chosen[chosen] = None
        self._changed.clear()
        return moved


def _group_of(request: Request) -> Hashable:
    return request.model, request.lora
