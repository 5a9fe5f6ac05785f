"""The requests that wait, in the order a `QueueBalancer` gives them.

Requests are filed in lanes, which never hold each other up, and within a lane
in flows.  The head of a lane is the request with the smallest (turn of its
flow, key, number of arrival).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterator
from typing import Any, TypeAlias

import attrs

from .alarms import Alarms
from .balancer.interface import Place, QueueBalancer
from .errors import LlmdError, PolicyError, policy_error, shown
from .lane import Entry, Lane, Rank
from .types import Request, RequestId, WorkerId
from .view import View

LaneName: TypeAlias = tuple[Hashable, Hashable]
Casualty: TypeAlias = tuple[Request, LlmdError]
_NEVER = math.inf


@attrs.define(eq=False)
class WaitingRequests:
    """Files requests as *balancer* says, and tells it who waits.

    With n requests in f flows and l lanes, `push`, `remove` and the moves of
    `refresh` are O(log n + log f) each.  One that waits alone is filed when a
    second comes, as most are sent on at once.  A hook that raises where no
    request can be blamed for it is kept in `faults`.

    Attributes:
        balancer: Says where each waits.
        group: Says what keeps requests apart whatever the balancer says; the
            model comes first.
        faults: The last errors of hooks.
    """

    balancer: QueueBalancer
    group: Callable[[Request], tuple[Hashable, ...]]
    faults: deque[LlmdError] = attrs.field(factory=lambda: deque(maxlen=16))
    _lanes: dict[LaneName, Lane] = attrs.field(factory=dict, init=False)
    _lanes_of: dict[Hashable, dict[LaneName, None]] = attrs.field(
        factory=dict, init=False
    )
    _entries: dict[RequestId, Entry] = attrs.field(factory=dict, init=False)
    _touched: dict[Hashable, None] = attrs.field(factory=dict, init=False)
    _alarms: Alarms = attrs.field(init=False)
    _alone: tuple[Entry, Rank] | None = attrs.field(default=None, init=False)
    _models: Counter[str] = attrs.field(factory=Counter, init=False)
    _tokens: Counter[str] = attrs.field(factory=Counter, init=False)
    _last: int = attrs.field(default=0, init=False)
    _prompt_tokens: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self._alarms = Alarms(self._entries)

    def push(
        self,
        request: Request,
        view: View,
        since: float,
        attempts: int = 0,
        again: bool = False,
        failed_on: frozenset[WorkerId] = frozenset(),
        generated_tokens: int = 0,
        number: int | None = None,
    ) -> LaneName:
        """Let *request*, here since *since*, wait; return its lane.

        One that waits *again* has the *number* that it had before, so that it
        stands among its equals where it stood.

        Raises:
            PolicyError: The balancer broke its contract; nothing changed.
        """
        if number is None:
            self._last += 1
            number = self._last
        group = self._apart(request, failed_on)
        entry = Entry(
            *(request, group, since, attempts, number, failed_on, generated_tokens),
            again=again,
        )
        self._enter(entry, view)
        return entry.lane

    def remove(self, id: RequestId, view: View) -> Entry | None:
        """Take a request out; None if it does not wait."""
        entry = self._entries.get(id)
        if entry is not None:
            self._drop(entry, view)
        return entry

    def drop_model(self, model: str, view: View) -> list[Request]:
        """Take out and return all requests for *model*."""
        ids = [id for id, t in self._entries.items() if t.request.model == model]
        dropped = [self.remove(id, view) for id in ids]
        return [entry.request for entry in dropped if entry is not None]

    def touch(self, flow: Hashable) -> None:
        """Note that the turn of *flow* may have changed."""
        if flow in self._lanes_of:
            self._touched[flow] = None

    def refresh(self, view: View) -> list[Casualty]:
        """Bring places and turns up to date.

        Returns:
            Requests the balancer failed on, taken out, and how it failed.
        """
        casualties: list[Casualty] = []
        for id in self._alarms.due(view.now):
            casualties += self._refile(id, view)
        # Asked after those, as who is overdue from now on may be next.
        for id in self._moved(view):
            casualties += self._refile(id, view)
        self.tell(self._touch_restless)
        while self._touched:
            flow = next(iter(self._touched))
            del self._touched[flow]
            casualties += self._turn(flow, view)
        return casualties

    def _touch_restless(self) -> None:
        for flow in self.balancer.restless:
            self.touch(flow)

    def ranks(self) -> list[tuple[Rank, LaneName]]:
        """Return the rank of each lane's head."""
        ranks = [(lane.head, name) for name, lane in self._lanes.items()]
        if self._alone is not None:
            entry, rank = self._alone
            ranks.append((rank, entry.lane))
        return ranks

    def rank(self, name: LaneName) -> Rank | None:
        """Return the rank of a lane's head; None if the lane is empty."""
        if self._alone is not None:
            entry, rank = self._alone
            return rank if entry.lane == name else None
        lane = self._lanes.get(name)
        return None if lane is None else lane.head

    def heads(self, id: RequestId) -> bool:
        """Say whether a request is the next of its lane."""
        entry = self._entries.get(id)
        return entry is not None and self.head(entry.lane) is entry

    def head(self, name: LaneName) -> Entry | None:
        """Return who is next in a lane."""
        if self._alone is not None:
            return self._alone[0]
        lane = self._lanes.get(name)
        return None if lane is None else lane.first

    def refiled(self, view: View) -> tuple[WaitingRequests, list[Casualty]]:
        """Return the same requests filed anew, and those the balancer failed on."""
        other = WaitingRequests(self.balancer, self.group, self.faults)
        other._last = self._last
        casualties: list[Casualty] = []
        for entry in self._copies(other):
            try:
                other._enter(entry, view, known=True)
            except LlmdError as error:
                self.tell(self.balancer.unqueued, entry.request, view)
                casualties.append((entry.request, error))
        return other, casualties

    def successor(self, balancer: QueueBalancer, view: View) -> WaitingRequests:
        """Return the same requests as another balancer files them.

        Raises:
            PolicyError: It broke its contract; the requests here are as before,
                and to it none of them waits.
        """
        other = WaitingRequests(balancer, self.group, self.faults)
        other._last = self._last
        try:
            for entry in self._copies(other):
                other._enter(entry, view)
        except LlmdError:
            other.dismiss(view)
            raise
        return other

    def _copies(self, other: WaitingRequests) -> Iterator[Entry]:
        """Yield the entries as *other* may file them, in order of arrival."""
        for old in sorted(self._entries.values(), key=lambda entry: entry.number):
            yield Entry(
                old.request,
                other._apart(old.request, old.failed_on),
                old.since,
                old.attempts,
                old.number,
                old.failed_on,
                old.generated_tokens,
                old.again,
            )

    def dismiss(self, view: View) -> None:
        """Tell the balancer that none of these wait for it any more."""
        for entry in self._entries.values():
            self.tell(self.balancer.unqueued, entry.request, view)

    @property
    def prompt_tokens(self) -> int:
        """Sum of the waiting prompts."""
        return self._prompt_tokens

    @property
    def next_alarm(self) -> float:
        """When somebody's place is to be asked for again; infinity for never."""
        return self._alarms.next_at

    def tokens_before(self, request: Request, view: View) -> int:
        """Sum of the prompts that would be sent before *request*, at most."""
        beside = self.tokens_of(view.workers.models_beside(request.model))
        return min(self.balancer.tokens_before(request, view), beside)

    def presses(self, request: Request, view: View) -> bool:
        """Say whether anybody presses who competes with *request* for a worker."""
        models = view.workers.models_beside(request.model)
        entries = [self._entries.get(id) for id in self.balancer.pressing]
        return any(
            entry is not None and (models is None or entry.request.model in models)
            for entry in entries
        )

    def tokens_ahead(self, request: Request, view: View) -> int:
        """Sum of the prompts expected to be sent before *request*."""
        expected = self.balancer.tokens_ahead(request, view)
        return min(expected, self.tokens_before(request, view))

    def of_model(self, model: str) -> int:
        """Count those for *model*."""
        return self._models[model]

    def tokens_of(self, models: Collection[str] | None) -> int:
        """Sum of the prompts for any of *models*; None for all."""
        tokens = self._tokens
        if models is None:
            return self._prompt_tokens
        if len(tokens) <= len(models):
            return sum(tokens[model] for model in tokens if model in models)
        return sum(tokens[model] for model in models if model in tokens)

    def group_of(self, request: Request) -> Hashable:
        """Return what keeps *request* apart whatever the balancer says."""
        return self.group(request)

    def since(self, id: RequestId) -> float | None:
        """Return when a waiting request arrived."""
        entry = self._entries.get(id)
        return None if entry is None else entry.since

    def __contains__(self, id: RequestId) -> bool:
        return id in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        if self._alone is not None:
            yield self._alone[0].request
        for lane in self._lanes.values():
            yield from lane

    def tell(self, hook: Callable[..., None], *what: Any) -> LlmdError | None:
        """Call a hook; return and keep what it raises."""
        try:
            hook(*what)
        except Exception as error:
            fault = policy_error(self.balancer, error)
            self.faults.append(fault)
            return fault
        return None

    def _apart(
        self, request: Request, failed_on: frozenset[WorkerId]
    ) -> tuple[Hashable, ...]:
        """Return the group of a request; who must go elsewhere holds nobody up."""
        group = self.group(request)
        return (*group, failed_on) if failed_on else group

    # Filing --------------------------------------------------------------

    def _enter(self, entry: Entry, view: View, *, known: bool = False) -> None:
        request, balancer = entry.request, self.balancer
        try:
            entry.move(self._place(entry, view))
            if not known:
                balancer.queued(request, view)
        except Exception as error:
            fault = policy_error(balancer, error)
            raise fault from fault.__cause__
        try:
            if self._entries or entry.until < _NEVER:
                self._join()
                self._file(entry, self._turn_of(entry.flow, view))
                if len(self._lanes_of[entry.flow]) > 1:
                    self._touched[entry.flow] = None
            else:
                turn = self._turn_of(entry.flow, view)
                self._alone = entry, (turn, entry.key, entry.number)
        except Exception as error:
            if not known:
                self.tell(balancer.unqueued, request, view)
            fault = policy_error(balancer, error)
            raise fault from fault.__cause__
        self._entries[request.id] = entry
        self._models[request.model] += 1
        self._tokens[request.model] += request.prompt_tokens
        self._prompt_tokens += request.prompt_tokens

    def _place(self, entry: Entry, view: View) -> Place:
        place = self.balancer.place(entry.request, view, entry.since)
        if _has_nan(place.key):
            name, key = type(self.balancer).__name__, shown(place.key)
            raise PolicyError(f"{name} gave {entry.request.id!r} the key {key}")
        hash((place.flow, place.lane))  # before anything is filed under them
        return place

    def _join(self) -> None:
        """File the one that waited alone: there is another, or it moves.

        Its turn is asked for anew when all are, as it answers for that itself.
        """
        if self._alone is not None:
            entry, (turn, _, _) = self._alone
            self._alone = None
            self._file(entry, turn)
            self._touched[entry.flow] = None

    def _file(self, entry: Entry, turn: Any) -> None:
        """Put an entry where it says; raise with nothing changed."""
        lane = self._lanes.get(entry.lane) or Lane()
        lane.put(entry, turn)
        entry.filed = True
        self._lanes[entry.lane] = lane
        self._lanes_of.setdefault(entry.flow, {})[entry.lane] = None
        if entry.until < _NEVER:
            self._alarms.set(entry)

    def _unfile(self, entry: Entry) -> None:
        lane = self._lanes[entry.lane]
        entry.filed = False
        if not lane.take(entry):
            lanes = self._lanes_of[entry.flow]
            del lanes[entry.lane]
            if not lanes:
                del self._lanes_of[entry.flow]
                self._touched.pop(entry.flow, None)
        if not lane:
            del self._lanes[entry.lane]

    def _drop(self, entry: Entry, view: View) -> None:
        request = entry.request
        del self._entries[request.id]
        if not self._entries:
            self._alarms.clear()
        if entry.filed:
            self._unfile(entry)
        else:
            self._alone = None
        self._prompt_tokens -= request.prompt_tokens
        self._models[request.model] -= 1
        self._tokens[request.model] -= request.prompt_tokens
        if not self._models[request.model]:
            del self._models[request.model], self._tokens[request.model]
        self.tell(self.balancer.unqueued, request, view)
        self.touch(entry.flow)

    def _moved(self, view: View) -> list[RequestId]:
        """Return who the balancer says has moved."""
        try:
            return [id for id in self.balancer.moved(view) if id in self._entries]
        except Exception as error:
            self.faults.append(policy_error(self.balancer, error))
            return []

    def _refile(self, id: RequestId, view: View) -> list[Casualty]:
        entry = self._entries.get(id)
        if entry is None:
            return []
        try:
            self._join()
            place = self._place(entry, view)
            self._unfile(entry)
            entry.move(place)
            self._file(entry, self._turn_of(entry.flow, view))
        except Exception as error:
            return [self._lose(entry, error, view)]
        return []

    def _turn_of(self, flow: Hashable, view: View) -> Any:
        turn = self.balancer.turn(flow, view)
        if _has_nan(turn):
            name = type(self.balancer).__name__
            raise PolicyError(f"{name} gave flow {shown(flow)} the turn {turn}")
        return turn

    def _turn(self, flow: Hashable, view: View) -> list[Casualty]:
        """Ask for the turn of *flow* anew; the next of it answers for errors."""
        lanes = [self._lanes[name] for name in self._lanes_of.get(flow, ())]
        if not lanes:
            return []
        try:
            turn = self._turn_of(flow, view)
            for lane in lanes:
                lane.turn(flow, turn)
        except Exception as error:
            self._touched[flow] = None
            return [self._lose(lanes[0].first_of(flow), error, view)]
        return []

    def _lose(self, entry: Entry, error: Exception, view: View) -> Casualty:
        """Take out a request that the balancer failed on."""
        self._drop(entry, view)
        return entry.request, policy_error(self.balancer, error)


def _has_nan(value: Any) -> bool:
    """Say whether a key or a turn is, or holds, what is not equal to itself."""
    if type(value) is not tuple:
        return bool(value != value)
    for part in value:  # noqa: SIM110, a generator would take as long as the rest
        if part != part or (type(part) is tuple and _has_nan(part)):
            return True
    return False
