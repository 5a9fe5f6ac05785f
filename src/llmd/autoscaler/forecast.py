"""Workers for what will have arrived once a new one is up."""

from __future__ import annotations

import math
from collections import deque

import attrs

from ..errors import NoSignal
from ..recommendation import Proposal
from ..view import View
from .amounts import positive
from .interface import Autoscaler
from .window import moment


@attrs.define(kw_only=True)
class HoltWinters:
    """Smooths a series and continues it: level, damped trend, season.

    Additive (Hyndman & Athanasopoulos, Forecasting: Principles and Practice,
    8.3).  Without a season it is Holt's method.

    Attributes:
        level: Weight of the newest value, in (0, 1].
        trend: Weight of the newest slope.
        season: Weight of the newest value at its place in the season.
        damping: By which the trend fades each step, in (0, 1].
        period: Values a season; 0 for none.

    >>> series = HoltWinters()
    >>> for value in range(50):
    ...     series.add(float(value))
    >>> 51.0 < series.ahead(3) < 52.5
    True
    """

    level: float = 0.5
    trend: float = 0.2
    season: float = 0.3
    damping: float = 0.98
    period: int = 0
    seen: int = attrs.field(default=0, init=False)
    _level: float = attrs.field(default=0.0, init=False)
    _slope: float = attrs.field(default=0.0, init=False)
    _season: list[float] = attrs.field(factory=list, init=False)

    def add(self, value: float) -> None:
        """Take in the next value."""
        if self.period and self.seen < self.period:
            # The first season only shows its shape.
            self._season.append(value)
        place = self.seen % self.period if self.period else 0
        shape = self._season[place] if self.period else 0.0
        if self.period and self.seen == self.period:
            self._centre()
            shape = self._season[place]
        if not self.seen:
            self._level = value
        elif not self.period or self.seen >= self.period:
            before = self._level
            expected = before + self.damping * self._slope
            self._level = self.level * (value - shape) + (1 - self.level) * expected
            slope = self.damping * self._slope
            self._slope = self.trend * (self._level - before) + (1 - self.trend) * slope
            if self.period:
                apart = value - self._level
                self._season[place] = (1 - self.season) * shape + self.season * apart
        self.seen += 1

    def ahead(self, steps: int) -> float:
        """Return what is expected *steps* values on, never under 0."""
        fades = sum([self.damping**step for step in range(1, steps + 1)])
        shape = 0.0
        if self.period and self.seen > self.period:
            shape = self._season[(self.seen + steps - 1) % self.period]
        return max(self._level + fades * self._slope + shape, 0.0)

    def _centre(self) -> None:
        mean = sum(self._season) / self.period
        self._season = [value - mean for value in self._season]
        self._level, self._slope = mean, 0.0


@attrs.define(kw_only=True)
class Forecast(Autoscaler):
    """Has ready what arrivals will need when a worker asked for now is up.

    A floor under other policies, in `Largest`: it knows arrivals alone, not
    what they did to the workers that are there.

    Attributes:
        rate_per_worker: Requests a second that one worker bears.
        cold_start: Seconds from asking for a worker until it is ready.
        step: Seconds between two values of the series.
        season: Seconds after which arrivals repeat, a day say; 0: never.
        spread: How many mean errors of the forecast are added to it.
        series: The method; one of its own if not given.

    >>> Forecast(rate_per_worker=2.5, cold_start=60.0, max_workers=8).step
    10.0
    """

    rate_per_worker: float = attrs.field(validator=positive)
    cold_start: float = attrs.field(default=60.0, validator=positive)
    step: float = attrs.field(default=10.0, validator=positive)
    season: float = 0.0
    spread: float = 1.0
    series: HoltWinters = attrs.field(factory=HoltWinters)
    _since: float = attrs.field(default=math.nan, init=False)
    _counted: int = attrs.field(default=0, init=False)
    _told: deque[float] = attrs.field(factory=deque, init=False)
    _error: float = attrs.field(default=0.0, init=False)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.season and not self.series.period:
            self.series.period = max(round(self.season / self.step), 1)

    def proposals(self, view: View) -> tuple[Proposal, ...]:
        try:
            rate = self.rate(view)
        except NoSignal as error:
            return (Proposal.untold("Forecast", error),)
        wish = self._checked(rate / self.rate_per_worker)
        note = f"{rate:.4g} requests/s within {self.cold_start:.4g} s"
        return (Proposal("Forecast", wish, note),)

    def wanted(self, view: View) -> float:
        return self.rate(view) / self.rate_per_worker

    def rate(self, view: View) -> float:
        """Return the most requests a second expected until a worker is up.

        Raises:
            NoSignal: Arrivals have not been watched for two steps yet.
        """
        self._watch(moment(view), view.totals.requests)
        if self.series.seen < 2:
            raise NoSignal("arrivals have not been watched long enough")
        steps = self._horizon
        expected = max([self.series.ahead(step) for step in range(1, steps + 1)])
        return expected + self.spread * self._error

    @property
    def _horizon(self) -> int:
        return math.ceil(self.cold_start / self.step)

    def _watch(self, now: float, arrived: int) -> None:
        if math.isnan(self._since):
            self._since, self._counted = now, arrived
        # After a long silence a season of zeros says as much as all of it.
        missed = int((now - self._since) / self.step)
        steps = min(missed, max(self.series.period, 1000))
        if not steps:
            return
        rate = (arrived - self._counted) / (missed * self.step)
        for _ in range(steps):
            self._judge(rate)
            self.series.add(rate)
        self._since += missed * self.step
        self._counted = arrived

    def _judge(self, rate: float) -> None:
        """Compare what was forecast for now with what came."""
        self._told.append(self.series.ahead(self._horizon))
        if len(self._told) > self._horizon:
            error = abs(rate - self._told.popleft())
            self._error += 0.1 * (error - self._error)
