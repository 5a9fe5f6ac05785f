"""The time slice that keeps shares, waits and waste within what was asked.

Deficit round robin (Shreedhar and Varghese, 1995) over the engines that have
requests, with three changes.  An urgent engine of a higher band may go ahead of
its place in the ring, but at most one turn goes ahead of anyone, and it is
paid for: the next regular turn is the shorter for it, by the switches it caused
too.  So a band buys promptness and never more time.  An idle engine gives way
at once.  And the length of a turn follows from what switches cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs

from ..errors import InvalidSlice
from .amounts import SHORTEST_TURN_S, amount
from .interface import GpuView, Infeasible, Slot, TimeSlice, Turn
from .quantum import Quantum, choose_quantum


def _share(_: object, field: attrs.Attribute[float], value: float) -> None:
    if not 0 < value < 1:
        raise InvalidSlice(f"{field.name} is {value}, must be in (0, 1)")


@attrs.define(kw_only=True)
class QuantumScheduler(TimeSlice):
    """Weighted turns, preempted for urgent requests, of a length that pays.

    With all engines busy: run time goes by weight; the part of time lost to
    switching is at most *overhead*; no engine waits longer for its turn than
    `gap_bound_s`.

    Attributes:
        overhead: Part of the time that switching may take, in (0, 1).
        max_wait_s: Longest wait for a turn that is still good enough.
        quantum_s: Fixes the turn of the smallest weight; None chooses it from
            what switches cost.
        min_turn_s: No turn is preempted earlier, nor given if less is left.

    >>> QuantumScheduler(overhead=0.1, max_wait_s=2.0).min_turn_s
    0.05
    """

    overhead: float = attrs.field(default=0.05, validator=_share)
    max_wait_s: float = attrs.field(
        default=math.inf, validator=amount(SHORTEST_TURN_S, endless=True)
    )
    quantum_s: float | None = attrs.field(
        default=None,
        validator=attrs.validators.optional(amount(SHORTEST_TURN_S)),
    )
    min_turn_s: float = attrs.field(default=0.05, validator=amount(SHORTEST_TURN_S))

    _deficits: dict[str, float] = attrs.field(factory=dict, init=False)
    _ring: list[str] = attrs.field(factory=list, init=False)
    _overtaken: set[str] = attrs.field(factory=set, init=False)
    _cut: set[str] = attrs.field(factory=set, init=False)
    _ahead: bool = attrs.field(default=False, init=False)
    _granted: str | None = attrs.field(default=None, init=False)
    _allowed: float = attrs.field(default=0.0, init=False)
    _alone: bool = attrs.field(default=False, init=False)
    _alone_until: float = attrs.field(default=-math.inf, init=False)

    def next(self, view: GpuView) -> Turn:
        self._enlist(view)
        running = view.running
        rivals = [slot for slot in view.wanting if slot.engine != running]
        if running is None:
            return self._pick(view)
        if not rivals:
            self._alone = True
            return Turn(running)
        self._meet(view.now)
        own = view.slot(running)
        mine = running == self._granted
        left = self._allowed - self._used(view.turn_s, view) if mine else 0.0
        if own.requests == 0 or left <= 0:
            return Turn(self._likely(view, running))
        urgent = self._urgent(view, [(own, left), *self._rivals(view, running)])
        if urgent is None:
            return Turn(running, left)
        if view.turn_s < self.min_turn_s:
            return Turn(running, min(left, self.min_turn_s - view.turn_s))
        return Turn(urgent.engine)

    def ran(self, engine: str, run_s: float, switch_s: float, view: GpuView) -> None:
        self._enlist(view)
        self._meet(view.now)
        if engine != self._granted:
            # Another policy gave this turn: it is not owed, but it was had.
            self._ring.remove(engine)
            self._ring.append(engine)
            return
        self._granted = None
        deficit = self._deficits[engine] - self._used(run_s, view)
        if self._ahead:
            # It caused the switch to itself and the one back.
            deficit -= 2 * switch_s
        elif view.slot(engine).requests == 0:
            deficit = min(deficit, 0.0)
        elif deficit >= self.min_turn_s and engine in self._ring:
            # It was cut short: the rest of its turn comes before all others.
            self._ring.remove(engine)
            self._ring.insert(0, engine)
            self._cut.add(engine)
        self._deficits[engine] = deficit
        self._ahead = False

    def left(self, engine: str) -> None:
        self._deficits.pop(engine, None)
        self._overtaken.discard(engine)
        self._cut.discard(engine)
        if engine in self._ring:
            self._ring.remove(engine)

    def upcoming(self, view: GpuView) -> tuple[str, ...]:
        self._enlist(view)
        wants = {slot.engine: slot.requests > 0 for slot in view.slots}
        return tuple(
            sorted(self._ring, key=lambda name: (name == view.running, not wants[name]))
        )

    def quantum(self, view: GpuView) -> Quantum | None:
        """Return the turn chosen for the engines that want one now."""
        slots = view.wanting
        if not slots:
            return None
        weights = [slot.weight for slot in slots]
        switches = [slot.usual_switch_s for slot in slots]
        return choose_quantum(weights, switches, self.overhead, self.max_wait_s)

    def turn_s(self, slot: Slot, view: GpuView) -> float:
        """Return the full turn of one engine."""
        slots = {one.engine: one for one in (*view.wanting, slot)}.values()
        parts = slot.weight / min(one.weight for one in slots)
        if self.quantum_s is not None:
            return self.quantum_s * parts
        chosen = self.quantum(view)
        return max(chosen.seconds if chosen else 0.0, self.min_turn_s) * parts

    def gap_bound_s(self, engine: str, view: GpuView, step_s: float = 0.0) -> float:
        """Return the longest wait for a turn, with these engines all busy.

        Every other engine has one turn and one switch before it, one of them
        may go ahead once more, and each turn may run over by one step.  An
        engine that itself went ahead of its place has had that turn: it may
        wait twice as long for the one after.
        """
        bands = {slot.band for slot in view.wanting}
        return self._gap_s(view.slot(engine), view, step_s, overtaken=len(bands) > 1)

    def complaint(self, view: GpuView) -> Infeasible | None:
        chosen = self.quantum(view)
        if chosen is None or chosen.feasible or len(view.wanting) < 2:
            return None
        slots = view.wanting
        turns = [self.turn_s(slot, view) for slot in slots]
        switches = [slot.usual_switch_s for slot in slots]
        waste = max(s / (s + turn) for s, turn in zip(switches, turns, strict=True))
        in_ring, overtaken = (
            max(self._gap_s(slot, view, overtaken=ahead) for slot in slots)
            for ahead in (False, True)
        )
        return Infeasible(
            reason=(
                f"{len(slots)} engines, {max(switches):.3f} s to switch: a waste of"
                f" {self.overhead:.0%} and a wait of {self.max_wait_s:g} s exclude each"
                f" other; turns of {min(turns):.3f} s waste {waste:.0%} and make a wait"
                f" of {in_ring:.3f} s in the ring, {overtaken:.3f} s where another goes"
                " ahead of its place, twice that for the next turn of who did"
            ),
            engines=len(slots),
            engines_that_fit=chosen.engines_that_fit,
        )

    def _gap_s(
        self, own: Slot, view: GpuView, step_s: float = 0.0, *, overtaken: bool
    ) -> float:
        """Return the longest wait of *own*, once *overtaken* or not at all."""
        turns = [
            self.turn_s(slot, view) + slot.usual_switch_s + step_s
            for slot in view.wanting
            if slot.engine != own.engine
        ]
        ahead = max(turns, default=0.0) if overtaken else 0.0
        return sum(turns) + ahead + own.usual_switch_s

    def _enlist(self, view: GpuView) -> None:
        for slot in view.slots:
            if slot.engine not in self._deficits:
                self._deficits[slot.engine] = 0.0
                self._ring.append(slot.engine)

    def _meet(self, now: float) -> None:
        """Begin to charge: time that nobody else wanted is free."""
        if self._alone:
            self._alone, self._alone_until = False, now

    def _used(self, run_s: float, view: GpuView) -> float:
        """Seconds of the present turn that count."""
        return max(0.0, min(run_s, view.now - self._alone_until))

    def _pick(self, view: GpuView) -> Turn:
        ring = self._wanting_ring(view)
        if not ring:
            return Turn(None)
        waits = [(slot, self._expected(slot, view)) for slot in ring]
        urgent = self._urgent(view, waits)
        if urgent is None:
            return self._regular(view, ring)
        for slot in ring:
            if slot.engine == urgent.engine:
                break
            self._overtaken.add(slot.engine)
        self._ahead, self._granted = True, urgent.engine
        self._allowed = self.turn_s(urgent, view)
        return Turn(urgent.engine, self._allowed)

    def _regular(self, view: GpuView, ring: list[Slot]) -> Turn:
        """Go round until somebody has a turn's worth, in O(N) whatever the debts.

        Raises:
            InvalidSlice: A subclass made a turn that no clock can measure.
        """
        turns = [(slot.engine, self.turn_s(slot, view)) for slot in ring]
        for name, full in turns:
            if not SHORTEST_TURN_S <= full < math.inf:
                raise InvalidSlice(f"the turn of {name!r} would take {full} s")
        visits = [self._visits(name, full) for name, full in turns]
        # Rounds in which nobody gets enough are added up and not gone one by one.
        rounds = min(visits)
        place = visits.index(rounds)
        for row, (name, full) in enumerate(turns):
            self._credit(name, full, rounds if row <= place else rounds - 1)
        for name, _ in turns[: place + 1]:
            self._ring.remove(name)
            self._ring.append(name)
        name, full = turns[place]
        self._overtaken.discard(name)
        self._ahead, self._granted = False, name
        self._allowed = max(self._deficits[name], self._worth(full))
        return Turn(name, self._allowed)

    def _worth(self, full: float) -> float:
        """Return what must be left for a turn; less is not worth a switch.

        Half a turn always is, or rounding would make every other turn a double
        one.
        """
        return min(self.min_turn_s, full / 2)

    def _visits(self, name: str, full: float) -> int:
        """Return how often the ring must come to an engine until it has a turn."""
        missing = math.ceil((self._worth(full) - self._deficits[name]) / full)
        return max(missing, 0) + 1 if name in self._cut else max(missing, 1)

    def _credit(self, name: str, full: float, visits: int) -> None:
        """Add to a deficit what *visits* in vain, or the one that counts, add."""
        if visits and name in self._cut:
            self._cut.discard(name)
            visits -= 1
        if visits:
            self._deficits[name] = min(self._deficits[name], full) + visits * full

    def _urgent(
        self, view: GpuView, waits: Sequence[tuple[Slot, float]]
    ) -> Slot | None:
        """Find who must go ahead of its place, by band and then by slack.

        Args:
            view: Now.
            waits: The engines in the order in which they would run, each with
                the seconds it would take; the first has or is next to have the
                GPU.
        """
        found: list[tuple[int, float, Slot]] = []
        waited = 0.0
        # The most urgent of those passed so far, and whether all may be passed.
        best_band, passable = math.inf, True
        for slot, seconds in waits:
            slack = slot.slack_s(view.now)
            late = slack < waited
            solvent = self._deficits[slot.engine] >= 0
            if slot.band < best_band < math.inf and passable and late and solvent:
                found.append((slot.band, slack, slot))
            best_band = min(best_band, slot.band)
            passable = passable and slot.engine not in self._overtaken
            waited += seconds
        return min(found, key=lambda one: one[:2])[2] if found else None

    def _rivals(self, view: GpuView, running: str) -> list[tuple[Slot, float]]:
        return [
            (slot, self._expected(slot, view))
            for slot in self._wanting_ring(view)
            if slot.engine != running
        ]

    def _expected(self, slot: Slot, view: GpuView) -> float:
        """Seconds that the next turn of an engine will take."""
        if slot.engine in self._cut:
            return self._deficits[slot.engine] + slot.usual_switch_s
        return self.turn_s(slot, view) + slot.usual_switch_s

    def _wanting_ring(self, view: GpuView) -> list[Slot]:
        wanting = {slot.engine: slot for slot in view.wanting}
        return [wanting[name] for name in self._ring if name in wanting]

    def _likely(self, view: GpuView, running: str) -> str:
        return next(
            slot.engine for slot in self._wanting_ring(view) if slot.engine != running
        )
