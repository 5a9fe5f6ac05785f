"""The engines of one GPU: how far each is, what its steps cost, what it holds."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Sequence

import attrs

from .interface import Slot
from .messages import Action, Sharer


class SeatState(enum.Enum):
    """How far an engine is; see `GpuArbiter` for the moves."""

    RUNNING = enum.auto()
    PAUSING = enum.auto()
    PAUSED = enum.auto()
    RESUMING = enum.auto()
    SLEEPING = enum.auto()
    ASLEEP = enum.auto()
    WAKING = enum.auto()
    LOST = enum.auto()


MOVES = {
    Action.PAUSE: (SeatState.PAUSING, SeatState.PAUSED),
    Action.RESUME: (SeatState.RESUMING, SeatState.RUNNING),
    Action.SLEEP: (SeatState.SLEEPING, SeatState.ASLEEP),
    Action.WAKE: (SeatState.WAKING, SeatState.PAUSED),
}
"""For each action, where an engine is while it lasts and when it is done."""

_AWAKE = frozenset(
    {
        SeatState.RUNNING,
        SeatState.PAUSING,
        SeatState.PAUSED,
        SeatState.RESUMING,
        SeatState.WAKING,
    }
)
_NEW = 0.5
"""Weight of the newest measurement of what a step costs."""


@attrs.define(eq=False)
class Seat:
    """One engine.

    Attributes:
        sharer: What it said when it joined.
        state: How far it is.
        costs: Seconds that each action takes, by the latest measurements.
        bring_s: Seconds from the end of another's turn to the start of its
            own, likewise.
        requests: As of `Slot`, and the next three.
        doing: What it was told to do and has not done.
        began_at: When it was told.
        late_at: When it is given up.
    """

    sharer: Sharer
    state: SeatState
    costs: dict[Action, float]
    bring_s: float
    requests: int = 0
    band: int = 0
    deadline: float = math.inf
    since: float = 0.0
    doing: Action | None = None
    began_at: float = 0.0
    late_at: float = math.inf

    @property
    def name(self) -> str:
        """Of the engine."""
        return self.sharer.engine

    @property
    def resident(self) -> bool:
        """Whether its weights are in GPU memory, or on their way there."""
        return self.state in _AWAKE

    @property
    def held_bytes(self) -> float:
        """Memory it holds or is about to; what goes to sleep holds it to the end."""
        if self.state is SeatState.ASLEEP:
            return self.sharer.asleep_bytes
        return self.sharer.awake_bytes

    def begin(self, action: Action, now: float, timeout_s: float) -> None:
        """Note that it was told to do *action*."""
        self.state, self.doing = MOVES[action][0], action
        self.began_at, self.late_at = now, now + timeout_s

    def end(self, now: float) -> None:
        """Note that it did, and learn what that costs."""
        assert self.doing is not None, "nothing was begun"
        cost = self.costs[self.doing]
        self.costs[self.doing] = cost + _NEW * (now - self.began_at - cost)
        self.state = MOVES[self.doing][1]
        self.doing, self.late_at = None, math.inf

    def brought(self, seconds: float) -> None:
        """Learn what it took to have it run."""
        self.bring_s += _NEW * (seconds - self.bring_s)

    def lose(self, late_at: float) -> None:
        """Give it up; its memory counts until it left, or until *late_at*."""
        self.state, self.doing, self.late_at = SeatState.LOST, None, late_at


@attrs.define(eq=False)
class Seats:
    """All engines of a GPU with *memory_bytes* for them."""

    memory_bytes: float
    _seats: dict[str, Seat] = attrs.field(factory=dict, init=False)

    def __contains__(self, engine: str) -> bool:
        return engine in self._seats

    def __getitem__(self, engine: str) -> Seat:
        return self._seats[engine]

    def __iter__(self) -> Iterator[Seat]:
        return iter(self._seats.values())

    def get(self, engine: str) -> Seat | None:
        """Return an engine's seat, if it has one."""
        return self._seats.get(engine)

    def add(self, sharer: Sharer, asleep: bool, now: float) -> Seat:
        """Give *sharer* a seat."""
        costs = {
            Action.PAUSE: sharer.pause_s,
            Action.RESUME: sharer.resume_s,
            Action.SLEEP: sharer.sleep_s,
            Action.WAKE: sharer.wake_s,
        }
        state = SeatState.ASLEEP if asleep else SeatState.RUNNING
        seat = Seat(sharer, state, costs, sharer.resume_s, since=now)
        self._seats[sharer.engine] = seat
        if sum(one.sharer.awake_bytes for one in self) > self.memory_bytes:
            for one in self:
                swap = one.costs[Action.SLEEP] + one.costs[Action.WAKE]
                one.bring_s = max(one.bring_s, one.costs[Action.RESUME] + swap)
        return seat

    def remove(self, engine: str) -> None:
        """Take an engine's seat."""
        del self._seats[engine]

    def fits(self, size_bytes: float) -> bool:
        """Say whether there is so much memory free."""
        return sum(seat.held_bytes for seat in self) + size_bytes <= self.memory_bytes

    def has_room(self, seat: Seat, freed_bytes: float = 0.0) -> bool:
        """Say whether *seat* could be awake with *freed_bytes* given up by others."""
        held = sum(other.held_bytes for other in self if other is not seat)
        return held - freed_bytes + seat.sharer.awake_bytes <= self.memory_bytes

    def victim(self, seat: Seat, upcoming: Sequence[str]) -> Seat | None:
        """Find whose weights to put away for *seat*: who comes last.

        None if putting away all that pause would not make room.
        """
        paused = [
            other
            for other in self
            if other is not seat and other.state is SeatState.PAUSED
        ]
        freed = sum(o.sharer.awake_bytes - o.sharer.asleep_bytes for o in paused)
        if not paused or not self.has_room(seat, freed):
            return None
        order = {name: place for place, name in enumerate(upcoming)}
        return max(paused, key=lambda other: (order.get(other.name, -1), other.name))

    def slot(self, seat: Seat, running: str | None) -> Slot:
        """Return what a policy sees of *seat*."""
        # What a pause takes is mostly the rest of a step, which is no waste:
        # only what was declared beyond it counts towards the length of turns.
        pauses = [other.sharer.pause_s for other in self if other is not seat]
        return Slot(
            engine=seat.name,
            weight=seat.sharer.weight,
            requests=seat.requests,
            band=seat.band,
            deadline=seat.deadline,
            since=seat.since,
            resident=seat.resident,
            switch_s=self._switch_s(seat, running),
            usual_switch_s=seat.bring_s + max(pauses, default=0.0),
        )

    def _switch_s(self, seat: Seat, running: str | None) -> float:
        """Expect the seconds until *seat* would run."""
        if running == seat.name:
            return 0.0
        seconds = seat.costs[Action.RESUME]
        if running is not None:
            seconds += self._seats[running].costs[Action.PAUSE]
        if seat.resident:
            return seconds
        seconds += seat.costs[Action.WAKE]
        if not self.has_room(seat):
            awake = [other for other in self if other is not seat and other.resident]
            sleeps = [other.costs[Action.SLEEP] for other in awake]
            seconds += max(sleeps, default=0.0)
        return seconds
