"""The `Autoscaler` interface: bounds, windows and rates around any wish."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import attrs

from ..copied import Copied
from ..errors import InvalidPolicy, NoSignal, PolicyError, shown
from ..recommendation import Proposal, Recommendation, Step
from ..view import View
from .amounts import is_number, is_whole
from .behavior import MOST, Behavior, Changes, Rules, Select, note_change
from .window import Window


@attrs.define(kw_only=True)
class Autoscaler(Copied, abc.ABC):
    """Follows a wish with bounds and patience.

    Subclasses implement `wanted` and need not care about flapping:

        wish -> tolerance -> windows -> rates -> bounds -> workers

    A wish that cannot be told now (`NoSignal`) keeps the count.  From zero
    workers a wish counts at once, whatever the windows say, and while a request
    waits there is never none, whatever the wish says.  Bounds and what waits hold
    even though the wish fails.

    Attributes:
        min_workers: Never fewer; 0 lets an idle fleet go.
        max_workers: Never more.
        patience: Seconds a smaller wish must last before it counts.
        tolerance: Part of the count by which a wish may be off with no effect.
        up: Rules for growth; what it leaves None is at once, within `tolerance`.
        down: Rules for shrinking; None: within `patience` and `tolerance`.
        advice: What was recommended last, and why.

    Raises:
        InvalidPolicy: A value is out of range.

    >>> from llmd.autoscaler import Percent, Rules
    >>> class OneSpare(Autoscaler):
    ...     def wanted(self, view):
    ...         return (view.workers.running_requests > 0).sum() + 1
    >>> OneSpare(max_workers=8, up=Rules(rates=(Percent(100, 15.0),))).patience
    300.0
    """

    min_workers: int = 1
    max_workers: int = 1
    patience: float = 300.0
    tolerance: float = 0.0
    up: Rules = attrs.field(factory=Rules)
    down: Rules = attrs.field(factory=Rules)
    advice: Recommendation | None = attrs.field(default=None, init=False)
    _asked: int | None = attrs.field(default=None, init=False)
    _lowest: Window = attrs.field(factory=lambda: Window(min), init=False)
    _highest: Window = attrs.field(factory=lambda: Window(max), init=False)
    _added: Changes = attrs.field(default=(), init=False)
    _removed: Changes = attrs.field(default=(), init=False)

    def __attrs_post_init__(self) -> None:
        low, high = self.min_workers, self.max_workers
        if not (is_whole(low) and is_whole(high) and 0 <= low <= high):
            raise InvalidPolicy(
                f"bounds are {shown(low)} and {shown(high)}, want whole numbers,"
                " 0 <= min_workers <= max_workers"
            )
        for name in ("patience", "tolerance"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                said = f"{name} is {shown(value)}, must be a number, and not negative"
                raise InvalidPolicy(said)

    @abc.abstractmethod
    def wanted(self, view: View) -> float:
        """Return how many workers the load at this moment deserves.

        Raises:
            NoSignal: It cannot be told now.
        """

    def proposals(self, view: View) -> tuple[Proposal, ...]:
        """Return what each signal wants; the largest counts."""
        name = type(self).__name__
        try:
            return (Proposal(name, self._checked(self.wanted(view))),)
        except NoSignal as error:
            return (Proposal.untold(name, error),)

    def target(self, view: View) -> int:
        """Return how many workers there should be.

        Raises:
            PolicyError: `wanted` gave a NaN or an infinity.
        """
        return self.recommend(view).workers

    def recommend(self, view: View) -> Recommendation:
        """Return how many workers there should be, and why.

        Raises:
            PolicyError: `wanted` gave a NaN or an infinity.  Where bounds or a
                request that waits decide, whatever it raises is only told of.
        """
        current = self._current(view)
        proposals = self._proposals(view, current)
        steps = self._settle(view.now, current, proposals)
        workers = steps[-1].after if steps else _wish(proposals)
        if workers < 1 <= self.max_workers and len(view.waiting):
            # Whatever was measured, it was measured without a worker to answer.
            steps.append(Step("waiting", workers, 1, "requests wait for a worker"))
            workers = 1
        if workers != current:
            self._note(view.now, workers - current)
        self._asked = workers
        self.advice = Recommendation(
            at=view.now,
            current=current,
            workers=workers,
            proposals=proposals,
            steps=tuple(steps),
        )
        return self.advice

    def recommendations(self, view: View) -> Sequence[Recommendation]:
        """Return one for each pool of workers; here one for all."""
        return (self.recommend(view),)

    # Inside --------------------------------------------------------------

    def _proposals(self, view: View, current: int) -> tuple[Proposal, ...]:
        """Ask the policy; where bounds or waiting decide, it need not answer."""
        try:
            proposals = self.proposals(view)
            for proposal in proposals:
                if math.isinf(proposal.workers):
                    self._checked(proposal.workers)
        except NoSignal as error:
            return (Proposal.untold(type(self).__name__, error),)
        except Exception as error:
            inside = self.min_workers <= current <= self.max_workers
            if inside and (current or not len(view.waiting)):
                raise
            return (Proposal.untold(type(self).__name__, error),)
        return proposals

    def _checked(self, wanted: float) -> float:
        if not math.isfinite(wanted):
            raise PolicyError(f"{type(self).__name__} wants {wanted} workers")
        return float(wanted)

    def _current(self, view: View) -> int:
        """Return what was asked for; at first, what is there."""
        if self._asked is None:
            return int(view.workers.supply().sum())
        return self._asked

    def _settle(
        self, now: float, current: int, proposals: tuple[Proposal, ...]
    ) -> list[Step]:
        """Return what turns the largest proposal into a count, in order."""
        if not self.min_workers <= current <= self.max_workers:
            return self._clamp(current)
        wish = _wish(proposals)
        told = [proposal for proposal in proposals if proposal.valid]
        if len(told) < len(proposals) and (not told or wish < current):
            reason = "a signal cannot be told, and might have asked for more"
            return [Step("no signal", wish if told else current, current, reason)]
        steps = self._tolerate(current, wish, told)
        desired = steps[-1].after if steps else wish
        steps += self._stabilise(now, current, desired)
        stable = steps[-1].after if steps else wish
        steps += self._limit(now, current, stable)
        return steps + self._clamp(steps[-1].after if steps else wish)

    def _tolerate(self, current: int, wish: int, told: list[Proposal]) -> list[Step]:
        if not current or wish == current:
            return []
        exact = max(proposal.workers for proposal in told)
        rules = self.up if exact > current else self.down
        given = rules.tolerance
        tolerance = self.tolerance if given is None else given
        if not abs(exact / current - 1.0) <= tolerance:
            return []
        reason = f"{exact:.4g} is within {tolerance:.3g} of {current}"
        return [Step("tolerance", wish, current, reason)]

    def _stabilise(self, now: float, current: int, desired: int) -> list[Step]:
        up, down = self.up.window or 0.0, self.down.window
        down = self.patience if down is None else down
        lowest = self._lowest.push(now, desired, up, seed=current)
        highest = self._highest.push(now, desired, down, seed=current)
        stable = min(max(current, lowest), highest) if current else desired
        if stable == desired:
            return []
        rising = desired >= current
        window, which = (up, "lowest") if rising else (down, "highest")
        rule = "up.window" if rising else "patience"
        reason = f"{stable} is the {which} wish of the last {window:g} s"
        return [Step(rule, desired, stable, reason)]

    def _limit(self, now: float, current: int, wish: int) -> list[Step]:
        behavior = Behavior(up=self.up, down=self.down)
        rules = self.up if wish > current else self.down
        if wish == current or not (rules.rates or rules.select is Select.DISABLED):
            return []
        bound = behavior.ceiling if wish > current else behavior.floor
        allowed = bound(current, self._added, self._removed, now)
        allowed = min(wish, allowed) if wish > current else max(wish, allowed)
        if allowed == wish:
            return []
        rule = "up.rates" if wish > current else "down.rates"
        rates = ", ".join(map(str, rules.rates)) or "none"
        reason = f"no more is allowed by {rules.select.value} of {rates}"
        return [Step(rule, wish, allowed, reason)]

    def _clamp(self, wish: int) -> list[Step]:
        low, high = self.min_workers, self.max_workers
        if wish > high:
            return [Step("max_workers", wish, high, f"never more than {high}")]
        if wish < low:
            return [Step("min_workers", wish, low, f"never fewer than {low}")]
        return []

    def _note(self, now: float, change: int) -> None:
        if change > 0:
            longest = self.up.longest
            self._added = note_change(self._added, now, change, longest)
        else:
            longest = self.down.longest
            self._removed = note_change(self._removed, now, -change, longest)


def _wish(proposals: tuple[Proposal, ...]) -> int:
    wishes = [proposal.workers for proposal in proposals if proposal.valid]
    return min(math.ceil(max([0.0, *wishes])), MOST)
