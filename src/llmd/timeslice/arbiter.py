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
from numbers import Real
from typing import Any, TypeVar

import attrs
import numpy as np

from ..errors import InvalidEvent, InvalidSlice, PolicyError, policy_error, shown
from . import messages as m
from .amounts import SHORTEST_TURN_S, amount
from .interface import GpuView, Infeasible, TimeSlice, Turn
from .messages import Action
from .seats import Seat, Seats, SeatState

Answer = TypeVar("Answer")

_RETRY_S = 0.1
"""Seconds until a policy that failed is asked again."""


def _time_slice(_: Any, __: Any, policy: Any) -> None:
    if not isinstance(policy, TimeSlice):
        raise InvalidSlice(f"{shown(policy)} is no TimeSlice")


@attrs.define(eq=False)
class GpuArbiter:
    """Carries out a `TimeSlice` on the engines of one GPU.

    A driver feeds it every event in order of time, carries out the commands
    that come back in order, and says `Asked` when the clock reaches `alarm`.
    It knows no clock, no engine and no GPU, so a simulator and a server drive
    the same one.

    A policy that raises or answers nonsense costs a `Blame` and nothing else:
    books are kept without it, whoever runs goes on, and it is asked again soon.

    Attributes:
        policy: Decides; may be replaced at any time.
        memory_bytes: Of the GPU, for all engines together; inf if all fit.
        prefetch: Wake the engine expected next while another runs, where
            memory allows.
        timeout_s: Longest an action may take before its engine is lost; inf
            waits for ever.
        seed: Of all randomness.
        history: The last turns.
        alarm: When to say `Asked` at the latest.

    >>> from llmd.timeslice import FifoLock, Joined, Sharer, Wanted
    >>> arbiter = GpuArbiter(FifoLock())
    >>> arbiter.handle(Joined(0.0, Sharer(engine="a")))
    [Do(engine='a', action=<Action.PAUSE: 'pause'>)]
    """

    policy: TimeSlice = attrs.field(validator=_time_slice)
    memory_bytes: float = attrs.field(
        default=math.inf, validator=amount(1.0, endless=True)
    )
    prefetch: bool = True
    timeout_s: float = attrs.field(
        default=60.0, validator=amount(SHORTEST_TURN_S, endless=True)
    )
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
    _blames: list[m.Blame] = attrs.field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._seats = Seats(self.memory_bytes)

    # What a driver calls ---------------------------------------------------

    def handle(self, event: m.GpuEvent) -> list[m.GpuCommand]:
        """Take in *event* and return what must now be done, in order.

        Events about engines that are gone are late, not wrong.

        Raises:
            InvalidEvent: It is older than the last one or never, of an unknown
                type, or an engine joins that is there already or has no room;
                nothing has changed.
        """
        if not self.now <= event.at < math.inf:
            raise InvalidEvent(f"{event!r} is before {self.now} or never")
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
        blames, self._blames = self._blames, []
        return [*commands, *blames]

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
            self._note(self.policy.left, engine)

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
        self._note(self.policy.left, engine)
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
        self._note(self.policy.ran, engine, run_s, switch_s, self.view())

    # Decisions -------------------------------------------------------------

    def _advance(self) -> list[m.GpuCommand]:
        self._ask_at = math.inf
        if any(seat.doing is Action.PAUSE for seat in self._seats):
            return []
        if self._target is None:
            return self._choose()
        running = self._seats[self._target]
        if running.state is not SeatState.RUNNING:
            return self._bring(running)
        turn = self._next()
        if turn is None:
            return []
        if turn.engine != running.name:
            return self._do(running, Action.PAUSE)
        self._ask_at = self.now + max(turn.seconds, SHORTEST_TURN_S)
        return [*self._judge(), *self._prepare()]

    def _choose(self) -> list[m.GpuCommand]:
        turn = self._next()
        if turn is None:
            return []
        if turn.engine is None:
            return self._judge()
        self._target, self._chosen_at = turn.engine, self.now
        return [*self._judge(), *self._bring(self._seats[turn.engine])]

    def _next(self) -> Turn | None:
        """Ask for a turn; None, and soon again, if the policy has none to give."""
        view = self.view()

        def fits(turn: object) -> bool:
            if not isinstance(turn, Turn) or not isinstance(turn.seconds, Real):
                return False
            idle = turn.engine is None and view.running is None
            # A turn of nothing would be asked for again at once, for ever.
            return (idle or turn.engine in self.engines) and turn.seconds > 0

        turn = self._ask(self.policy.next, view, fits=fits, otherwise=None)
        if turn is None:
            self._ask_at = self.now + _RETRY_S
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
        kinds, before = (Infeasible, type(None)), self._complaint
        what = self._complaint = self._ask(
            self.policy.complaint,
            self.view(),
            fits=lambda what: isinstance(what, kinds),
            otherwise=before,
        )
        same = (what and what.engines) == (before and before.engines)
        return [] if same else [m.Complain(what)]

    # Details ---------------------------------------------------------------

    def _upcoming(self) -> tuple[str, ...]:
        view, there = self.view(), frozenset(self.engines)
        return self._ask(
            self.policy.upcoming,
            view,
            fits=lambda order: isinstance(order, tuple) and there.issuperset(order),
            otherwise=TimeSlice.upcoming(self.policy, view),
        )

    def _ask(
        self,
        question: Callable[[GpuView], Answer],
        view: GpuView,
        *,
        fits: Callable[[Answer], bool],
        otherwise: Answer,
    ) -> Answer:
        """Return the policy's answer, or blame it and go on with *otherwise*.

        Nothing is raised, as commands may be due already.
        """
        try:
            answer = question(view)
            if fits(answer):
                return answer
            name = f"{type(self.policy).__name__}.{question.__name__}"
            said = f"{name} answered {shown(answer)} to {shown(view, 500)}"
            self._blame(PolicyError(said))
        except Exception as error:
            self._blame(error)
        return otherwise

    def _note(self, hook: Callable[..., None], *what: Any) -> None:
        """Let the policy take note; what it raises changes no books."""
        try:
            hook(*what)
        except Exception as error:
            self._blame(error)

    def _blame(self, error: Exception) -> None:
        self._blames.append(m.Blame(policy_error(self.policy, error)))

    def _do(self, seat: Seat, action: Action) -> list[m.GpuCommand]:
        seat.begin(action, self.now, self.timeout_s)
        return [m.Do(seat.name, action)]

    def _is_doing(self, engine: str, action: Action) -> bool:
        seat = self._seats.get(engine)
        return seat is not None and seat.doing is action

    def _set_alarm(self) -> None:
        late = min((s.late_at for s in self._seats), default=math.inf)
        self.alarm = min(self._ask_at, late)
