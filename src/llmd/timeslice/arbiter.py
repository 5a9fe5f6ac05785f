"""The state machine of one shared GPU: events in, commands out.

    joins -> PAUSING -> PAUSED <-> RESUMING -> RUNNING -> PAUSING ...
                          |  ^
                SLEEPING  v  |  WAKING
                         ASLEEP

At most one engine is in RESUMING or RUNNING, and none while another is in
PAUSING.  Every step has a deadline, after which its engine is lost and the ring
goes on without it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import attrs
import numpy as np

from ..errors import InvalidEvent, PolicyError, shortened, shown
from . import messages as m
from .interface import GpuView, Infeasible, TimeSlice, Turn
from .messages import Action
from .seats import Seat, Seats, SeatState

Answer = TypeVar("Answer")

_SHORTEST = 1e-6
"""Seconds until a policy is asked again; what is left by rounding is less."""


@attrs.define(eq=False)
class GpuArbiter:
    """Carries out a `TimeSlice` on the engines of one GPU.

    A driver feeds it every event in order of time, carries out the commands
    that come back in order, and says `Asked` when the clock reaches `alarm`.
    It knows no clock, no engine and no GPU, so a simulator and a server drive
    the same one.

    Attributes:
        policy: Decides; may be replaced at any time.
        memory_bytes: Of the GPU, for all engines together; inf if all fit.
        prefetch: Wake the engine expected next while another runs, where
            memory allows.
        timeout_s: Longest an action may take before its engine is lost.
        seed: Of all randomness.
        history: The last turns.
        alarm: When to say `Asked` at the latest.

    >>> from llmd.timeslice import FifoLock, Joined, Sharer, Wanted
    >>> arbiter = GpuArbiter(FifoLock())
    >>> arbiter.handle(Joined(0.0, Sharer(engine="a")))
    [Do(engine='a', action=<Action.PAUSE: 'pause'>)]
    """

    policy: TimeSlice
    memory_bytes: float = math.inf
    prefetch: bool = True
    timeout_s: float = 60.0
    seed: int = 0
    history: deque[m.TurnTaken] = attrs.field(
        factory=lambda: deque(maxlen=10_000), init=False
    )
    alarm: float = attrs.field(default=math.inf, init=False)
    now: float = attrs.field(default=-math.inf, init=False)
    _rng: np.random.Generator = attrs.field(init=False)
    _seats: Seats = attrs.field(init=False)
    _target: str | None = attrs.field(default=None, init=False)
    _chosen_at: float = attrs.field(default=0.0, init=False)
    _began_at: float = attrs.field(default=0.0, init=False)
    _ask_at: float = attrs.field(default=math.inf, init=False)
    _complaint: Infeasible | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._seats = Seats(self.memory_bytes)

    # What a driver calls ---------------------------------------------------

    def handle(self, event: m.GpuEvent) -> list[m.GpuCommand]:
        """Take in *event* and return what must now be done, in order.

        Events about engines that are gone are late, not wrong.

        Raises:
            InvalidEvent: It is older than the last one, of an unknown type, or
                an engine joins that is there already or has no room.
            PolicyError: The policy broke its contract.
        """
        if not event.at >= self.now:
            raise InvalidEvent(f"{event!r} is before {self.now}")
        commands: list[m.GpuCommand] = []
        match event:
            case m.Joined(sharer=sharer):
                self._check(event)
                self.now = event.at
                commands += self._join(sharer, event.asleep)
            case m.Left(engine=engine):
                self.now = event.at
                self._leave(engine)
            case m.Wanted(engine=engine):
                self.now = event.at
                self._want(event)
            case m.Done(engine=engine, action=action):
                self.now = event.at
                self._done(engine, action)
            case m.Failed(engine=engine, action=action, error=error):
                self.now = event.at
                if self._is_doing(engine, action):
                    commands += self._lose(engine, f"{action.value} failed: {error}")
            case m.Asked():
                self.now = event.at
            case _:
                raise InvalidEvent(f"{event!r} is of no type an arbiter knows")
        commands += self._expire()
        commands += self._advance()
        self._set_alarm()
        return commands

    @property
    def running(self) -> str | None:
        """Who has the GPU; None between two turns."""
        if self._target is None:
            return None
        state = self._seats[self._target].state
        return self._target if state is SeatState.RUNNING else None

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines that take part, in order of their names."""
        return tuple(
            sorted(s.name for s in self._seats if s.state is not SeatState.LOST)
        )

    def resident(self, engine: str) -> bool:
        """Say whether an engine's weights are in GPU memory."""
        seat = self._seats.get(engine)
        return seat is not None and seat.resident

    def view(self) -> GpuView:
        """Return what the policy sees."""
        running, seats = self.running, self._seats
        return GpuView(
            now=self.now,
            rng=self._rng,
            slots=tuple([seats.slot(seats[name], running) for name in self.engines]),
            running=running,
            turn_s=self.now - self._began_at if running else 0.0,
        )

    # Events ----------------------------------------------------------------

    def _check(self, event: m.Joined) -> None:
        if event.sharer.engine in self._seats:
            raise InvalidEvent(f"{event!r}: this engine is there already")
        if not event.asleep and not self._seats.fits(event.sharer.awake_bytes):
            raise InvalidEvent(f"{event!r}: no room for it awake, let it sleep first")

    def _join(self, sharer: m.Sharer, asleep: bool) -> list[m.GpuCommand]:
        seat = self._seats.add(sharer, asleep, self.now)
        return [] if asleep else self._do(seat, Action.PAUSE)

    def _leave(self, engine: str) -> None:
        if engine in self._seats:
            self._end_turn(engine)
            self._seats.remove(engine)
            self.policy.left(engine)

    def _want(self, event: m.Wanted) -> None:
        seat = self._seats.get(event.engine)
        if seat is None:
            return
        if not seat.requests and event.requests and event.engine != self._target:
            seat.since = event.at
        seat.requests, seat.band = event.requests, event.band
        seat.deadline = event.deadline

    def _done(self, engine: str, action: Action) -> None:
        if not self._is_doing(engine, action):
            return
        seat = self._seats[engine]
        seat.end(self.now)
        if action is Action.RESUME:
            self._began_at = self.now
            seat.brought(self.now - self._chosen_at)
        elif action is Action.PAUSE:
            self._end_turn(engine)

    def _expire(self) -> list[m.GpuCommand]:
        """Give up who is late, and forget who was given up and never left."""
        commands: list[m.GpuCommand] = []
        for seat in [seat for seat in self._seats if seat.late_at <= self.now]:
            if seat.doing is None:
                self._seats.remove(seat.name)
            else:
                reason = f"{seat.doing.value} took over {self.timeout_s:g} s"
                commands += self._lose(seat.name, reason)
        return commands

    def _lose(self, engine: str, reason: str) -> list[m.GpuCommand]:
        """Go on without *engine*."""
        self._end_turn(engine)
        self._seats[engine].lose(self.now + self.timeout_s)
        self.policy.left(engine)
        return [m.Lost(engine, reason)]

    def _end_turn(self, engine: str) -> None:
        """Charge the turn of *engine*, if it has one, and free the GPU."""
        if engine != self._target:
            return
        seat = self._seats[engine]
        self._target = None
        if seat.state is SeatState.RESUMING or self._began_at < self._chosen_at:
            return
        seat.since = self.now
        self.history.append(
            m.TurnTaken(
                engine=engine,
                chosen_at=self._chosen_at,
                began_at=self._began_at,
                ended_at=self.now,
            )
        )
        switch_s = self._began_at - self._chosen_at
        run_s = self.now - self._began_at
        self._ask(self.policy.ran, engine, run_s, switch_s, self.view())

    # Decisions -------------------------------------------------------------

    def _advance(self) -> list[m.GpuCommand]:
        commands: list[m.GpuCommand] = []
        self._ask_at = math.inf
        if any(seat.doing is Action.PAUSE for seat in self._seats):
            return commands
        if self.running is not None:
            running = self._seats[self.running]
            turn = self._next()
            if turn.engine != running.name:
                return self._do(running, Action.PAUSE)
            self._ask_at = self.now + max(turn.seconds, _SHORTEST)
            return [*self._judge(), *self._prepare()]
        if self._target is None:
            turn = self._next()
            if turn.engine is None:
                return self._judge()
            self._target, self._chosen_at = turn.engine, self.now
            commands += self._judge()
        return [*commands, *self._bring(self._seats[self._target])]

    def _next(self) -> Turn:
        view = self.view()
        turn = self._ask(self.policy.next, view)
        known = turn.engine is None or turn.engine in self.engines
        # A turn of nothing would be asked for again at once, for ever.
        if not known or not turn.seconds > 0 or (view.running and not turn.engine):
            name = type(self.policy).__name__
            raise PolicyError(f"{name} answered {shown(turn)} to {shown(view, 500)}")
        return turn

    def _bring(self, seat: Seat) -> list[m.GpuCommand]:
        """Take the next step towards having *seat* run."""
        if seat.state is SeatState.PAUSED:
            return self._do(seat, Action.RESUME)
        if seat.state is not SeatState.ASLEEP:
            return []
        if self._seats.has_room(seat):
            return self._do(seat, Action.WAKE)
        busy = any(s.doing is not None for s in self._seats)
        victim = self._seats.victim(seat, self._upcoming())
        if victim is not None:
            return [] if busy else self._do(victim, Action.SLEEP)
        leaving = any(s.state is SeatState.LOST for s in self._seats)
        if busy or leaving:
            return []
        lost = self._lose(seat.name, f"needs {seat.sharer.awake_bytes:.0f} bytes")
        return [*lost, *self._advance()]

    def _prepare(self) -> list[m.GpuCommand]:
        """Wake who comes next while another runs, if memory allows."""
        busy = any(seat.doing is not None for seat in self._seats)
        if not self.prefetch or busy or math.isinf(self.memory_bytes):
            return []
        for name in self._upcoming():
            seat = self._seats[name]
            if name == self._target or not seat.requests:
                continue
            if seat.state is not SeatState.ASLEEP:
                return []
            if self._seats.has_room(seat):
                return self._do(seat, Action.WAKE)
            victim = self._seats.victim(seat, self._upcoming())
            return self._do(victim, Action.SLEEP) if victim else []
        return []

    def _judge(self) -> list[m.GpuCommand]:
        """Complain when what is wrong has changed."""
        what = self._ask(self.policy.complaint, self.view())
        before = self._complaint
        self._complaint = what
        same = (what and what.engines) == (before and before.engines)
        return [] if same else [m.Complain(what)]

    # Details ---------------------------------------------------------------

    def _upcoming(self) -> tuple[str, ...]:
        return self._ask(self.policy.upcoming, self.view())

    def _ask(self, question: Callable[..., Answer], *about: Any) -> Answer:
        """Ask the policy; whatever it raises is its breach of contract."""
        try:
            return question(*about)
        except Exception as error:
            name, said = type(self.policy).__name__, shortened(str(error), 500)
            failure = f"{name} raised {type(error).__name__}: {said}"
            raise PolicyError(failure) from error

    def _do(self, seat: Seat, action: Action) -> list[m.GpuCommand]:
        seat.begin(action, self.now, self.timeout_s)
        return [m.Do(seat.name, action)]

    def _is_doing(self, engine: str, action: Action) -> bool:
        seat = self._seats.get(engine)
        return seat is not None and seat.doing is action

    def _set_alarm(self) -> None:
        late = min((s.late_at for s in self._seats), default=math.inf)
        self.alarm = min(self._ask_at, late)
