"""Knative's pod autoscaler: a slow mean, and a fast one for bursts."""

from __future__ import annotations

import math

import attrs

from ..recommendation import Proposal
from ..view import View
from .amounts import positive
from .interface import Autoscaler
from .window import Mean, moment


@attrs.define(kw_only=True)
class Kpa(Autoscaler):
    """Follows the mean concurrency, and in a burst the last seconds of it.

    Rules: knative/serving pkg/autoscaler/scaling/autoscaler.go, calmed in three
    ways, since with Knative's defaults a steady load near the target of one
    worker moves the count a hundred times an hour:

    - Knative rounds the fast mean up to whole workers before it compares, so
      with one worker 1.01 of its target is "200 %" already, and a panic of 60
      seconds.  Here it is compared as it is.
    - `patience` is Knative's scale-down-delay: 0 there, a quarter of an hour
      here, its documentation's example.
    - `tolerance` is a tenth, as an HPA's; Knative has none.

    With `patience=0.0, tolerance=0.0` it moves as freely as Knative does.

    Attributes:
        requests_per_worker: Running and waiting together.
        stable: Seconds of the slow mean.
        panic: Seconds of the fast one.
        threshold: Panics when the fast mean calls for so many times the ready
            workers; while in panic the count never falls, and panic lasts
            until `stable` seconds have passed without such a call.

    >>> Kpa(requests_per_worker=7, max_workers=4).panic
    6.0
    """

    requests_per_worker: float = attrs.field(validator=positive)
    stable: float = attrs.field(default=60.0, validator=positive)
    panic: float = attrs.field(default=6.0, validator=positive)
    threshold: float = attrs.field(default=2.0, validator=positive)
    patience: float = 900.0
    tolerance: float = 0.1
    _seen: Mean = attrs.field(init=False)
    _panicked_at: float = attrs.field(default=-math.inf, init=False)
    _most: float = attrs.field(default=0.0, init=False)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self._seen = Mean(longest=self.stable)

    def proposals(self, view: View) -> tuple[Proposal, ...]:
        wish = self.wanted(view)
        mode = "panic" if self._panicking(view.now) else "stable"
        return (Proposal("Kpa", self._checked(wish), f"in {mode} mode"),)

    def wanted(self, view: View) -> float:
        now = moment(view)
        running = int(view.workers.running_requests.sum()) + len(view.waiting)
        self._seen.add(now, float(running))
        stable = self._seen.over(now, self.stable) / self.requests_per_worker
        burst = self._seen.over(now, self.panic) / self.requests_per_worker
        ready = int(view.workers.ready().sum())
        if burst >= self.threshold * max(ready, 1):
            self._panicked_at = now
        if not self._panicking(now):
            self._most = 0.0
            return stable
        self._most = max(self._most, burst, stable, float(ready))
        return self._most

    def _panicking(self, now: float) -> bool:
        return now - self._panicked_at < self.stable
