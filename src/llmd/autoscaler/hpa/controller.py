"""One pass of the HPA v2 controller, as a pure function of its history.

Rules: kubernetes/kubernetes pkg/controller/podautoscaler/horizontal.go.

    outside [min, max]?  -> the bound, at once
    else proposals -> their max -> window -> rates -> bounds
"""

from __future__ import annotations

import math

import attrs

from ...errors import InvalidPolicy, NoSignal, shown
from ...recommendation import Proposal, Recommendation, Step
from ..amounts import is_number, is_whole
from ..behavior import Behavior, Changes, note_change
from .calculator import Tolerance
from .metrics import External, Metric, Object
from .pods import Scene


@attrs.frozen
class History:
    """What an HPA remembers from one pass to the next.

    Attributes:
        wishes: When a count was recommended, before any window held it.
        added: When pods were added, and how many.
        removed: When pods were removed, and how many.
    """

    wishes: Changes = ()
    added: Changes = ()
    removed: Changes = ()


@attrs.frozen(kw_only=True)
class HpaSpec:
    """A HorizontalPodAutoscaler's spec, with the controller's own settings.

    Attributes:
        min_replicas: Never fewer; 0 needs an Object or External metric.
        max_replicas: Never more.
        metrics: The largest of what they ask for counts.
        behavior: Windows and rates; None: the rules from before there were any.
        tolerance: Where the behavior gives none.
        downscale_window: Seconds, where the behavior gives none.
        cpu_initialization: See `Tolerance`, as the next.
        readiness_delay: Seconds.

    Raises:
        InvalidPolicy: Bounds or metrics make no sense.

    >>> from llmd.autoscaler.hpa import AverageValue
    >>> spec = HpaSpec(max_replicas=9, metrics=(External("q", AverageValue(5)),))
    >>> scene = Scene(now=0.0, replicas=1, present=1, values={"q": [38]})
    >>> advice, history = spec.step(History(), scene)
    >>> print(advice.explain())
    1 -> 4 workers at 0 s
      External q wants 8
      8 -> 4 by ScaleUpLimit: at most the double, or 4, at once
    """

    max_replicas: int
    metrics: tuple[Metric, ...]
    min_replicas: int = 1
    behavior: Behavior | None = None
    tolerance: float = 0.1
    downscale_window: float = 300.0
    cpu_initialization: float = 300.0
    readiness_delay: float = 30.0

    def __attrs_post_init__(self) -> None:
        low, high = self.min_replicas, self.max_replicas
        if not (is_whole(low) and is_whole(high) and 0 <= low <= high and high):
            raise InvalidPolicy(
                f"bounds are {shown(low)} and {shown(high)}, want whole numbers,"
                " 0 <= min <= max and 1 <= max"
            )
        if not self.metrics:
            raise InvalidPolicy("an HPA needs a metric")
        for name in ("tolerance", "downscale_window"):
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value < math.inf):
                raise InvalidPolicy(f"{name} is {shown(value)}")
        if not self.min_replicas and not self._knows_zero:
            raise InvalidPolicy("min_replicas 0 needs an Object or External metric")

    def step(self, history: History, scene: Scene) -> tuple[Recommendation, History]:
        """Return what to have now, and the history for the next pass."""
        current = scene.replicas
        if not history.wishes:
            history = attrs.evolve(history, wishes=((scene.now, current),))
        bound = self._bound(current)
        if bound is not None:
            return self._end(history, scene, (), (bound,))
        proposals = self._proposals(scene)
        desired, held = _largest(proposals, current)
        if held is not None:
            return self._end(history, scene, proposals, (held,))
        settle = self._settle_plainly if self.behavior is None else self._settle
        history, steps = settle(history, scene, desired)
        return self._end(history, scene, proposals, steps)

    @property
    def _knows_zero(self) -> bool:
        """Whether some metric can be told with no pod there."""
        return any(isinstance(metric, Object | External) for metric in self.metrics)

    def _bound(self, current: int) -> Step | None:
        low, high = self.min_replicas, self.max_replicas
        if current == 0:
            reason = "no pods were asked for, so an HPA with a minimum lets them rest"
            return Step("ScalingDisabled", 0, 0, reason) if low else None
        if current > high:
            return Step("TooManyReplicas", current, high, f"never more than {high}")
        if current < low:
            return Step("TooFewReplicas", current, low, f"never fewer than {low}")
        return None

    def _proposals(self, scene: Scene) -> tuple[Proposal, ...]:
        behavior = self.behavior or Behavior()
        up, down = behavior.up.tolerance, behavior.down.tolerance
        tolerance = Tolerance(
            up=self.tolerance if up is None else up,
            down=self.tolerance if down is None else down,
            cpu_initialization=self.cpu_initialization,
            readiness_delay=self.readiness_delay,
        )
        return tuple([_propose(metric, scene, tolerance) for metric in self.metrics])

    def _settle_plainly(
        self, history: History, scene: Scene, desired: int
    ) -> tuple[History, tuple[Step, ...]]:
        now, current = scene.now, scene.replicas
        recent = [
            wish for at, wish in history.wishes if at >= now - self.downscale_window
        ]
        stable = max(recent, default=desired)
        steps = []
        if stable > desired:
            reason = f"the highest wish of the last {self.downscale_window:g} s"
            steps.append(Step("ScaleDownStabilized", desired, stable, reason))
        stable = max(stable, desired)
        limit = max(2 * current, 4)
        if stable > limit and limit < self.max_replicas:
            reason = "at most the double, or 4, at once"
            steps.append(Step("ScaleUpLimit", stable, limit, reason))
            stable = limit
        history = self._remember(history, now, desired, self.downscale_window)
        return history, (*steps, *self._clamp(stable))

    def _settle(
        self, history: History, scene: Scene, desired: int
    ) -> tuple[History, tuple[Step, ...]]:
        assert self.behavior is not None, "settled by a behavior that is not there"
        now, current, behavior = scene.now, scene.replicas, self.behavior
        up = behavior.up.window or 0.0
        down = behavior.down.window
        down = self.downscale_window if down is None else down
        lowest = min([desired, *[w for at, w in history.wishes if at > now - up]])
        highest = max([desired, *[w for at, w in history.wishes if at > now - down]])
        stable = min(max(current, lowest), highest)
        steps = []
        if stable != desired:
            rule, window, which = (
                ("ScaleUpStabilized", up, "lowest")
                if desired >= current
                else ("ScaleDownStabilized", down, "highest")
            )
            reason = f"the {which} wish of the last {window:g} s"
            steps.append(Step(rule, desired, stable, reason))
        limited = self._limit(behavior, history, now, current, stable)
        history = self._remember(history, now, desired, max(up, down))
        return history, (*steps, *limited)

    def _limit(
        self, behavior: Behavior, history: History, now: float, current: int, wish: int
    ) -> tuple[Step, ...]:
        if wish > current:
            rule, rules, reached = "ScaleUpLimit", behavior.up, behavior.ceiling
        else:
            rule, rules, reached = "ScaleDownLimit", behavior.down, behavior.floor
        bound = reached(current, history.added, history.removed, now)
        allowed = min(wish, bound) if wish > current else max(wish, bound)
        if self.min_replicas <= allowed <= self.max_replicas and allowed != wish:
            rates = ", ".join(map(str, rules.rates)) or "none"
            reason = f"the rates allow no more: {rules.select.value} of {rates}"
            return (Step(rule, wish, allowed, reason),)
        return self._clamp(wish)

    def _clamp(self, wish: int) -> tuple[Step, ...]:
        low, high = self.min_replicas, self.max_replicas
        if wish > high:
            return (Step("TooManyReplicas", wish, high, f"never more than {high}"),)
        if wish < low:
            return (Step("TooFewReplicas", wish, low, f"never fewer than {low}"),)
        return ()

    def _remember(
        self, history: History, now: float, desired: int, window: float
    ) -> History:
        kept = [(at, wish) for at, wish in history.wishes if at >= now - window]
        return attrs.evolve(history, wishes=(*kept, (now, desired)))

    def _end(
        self,
        history: History,
        scene: Scene,
        proposals: tuple[Proposal, ...],
        steps: tuple[Step, ...],
    ) -> tuple[Recommendation, History]:
        current = scene.replicas
        wish = _largest(proposals, current)[0]
        workers = steps[-1].after if steps else wish
        advice = Recommendation(
            at=scene.now,
            current=current,
            workers=workers,
            proposals=proposals,
            steps=steps,
        )
        return advice, self._changed(history, scene.now, workers - current)

    def _changed(self, history: History, now: float, change: int) -> History:
        if self.behavior is None or not change:
            return history
        if change > 0:
            longest = self.behavior.up.longest
            added = note_change(history.added, now, change, longest)
            return attrs.evolve(history, added=added)
        longest = self.behavior.down.longest
        removed = note_change(history.removed, now, -change, longest)
        return attrs.evolve(history, removed=removed)


def _propose(metric: Metric, scene: Scene, tolerance: Tolerance) -> Proposal:
    name = f"{type(metric).__name__} {metric.name}"
    try:
        return Proposal(name, float(metric.count(scene, tolerance)))
    except NoSignal as error:
        return Proposal.untold(name, error)


def _largest(proposals: tuple[Proposal, ...], current: int) -> tuple[int, Step | None]:
    """Return the largest proposal, and what forbids to follow it, if anything."""
    told = [int(proposal.workers) for proposal in proposals if proposal.valid]
    if not told:
        reason = "no metric can be told"
        return current, Step("InvalidMetrics", current, current, reason)
    largest = max([0, *told])
    if len(told) < len(proposals) and largest < current:
        reason = "a metric cannot be told, and might have asked for more"
        return largest, Step("InvalidMetrics", largest, current, reason)
    return largest, None
