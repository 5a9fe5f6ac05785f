"""How fast a count may follow a wish: windows and rates, as HPA v2 has them.

Rules: kubernetes/kubernetes pkg/controller/podautoscaler/horizontal.go and
pkg/apis/autoscaling/v2/defaults.go.  All functions here are pure.
"""

from __future__ import annotations

import abc
import enum
import math
from typing import Any, TypeAlias

import attrs

from ..errors import InvalidPolicy, shown
from .amounts import is_number, is_whole

MOST = 2**31 - 1
"""The largest count Kubernetes can hold."""

Changes: TypeAlias = tuple[tuple[float, int], ...]
"""When workers were added, or removed, and how many."""


class Select(enum.Enum):
    """Which of several rates binds."""

    MAX = "Max"
    MIN = "Min"
    DISABLED = "Disabled"


@attrs.frozen
class Rate(abc.ABC):
    """The most change within a period.

    Attributes:
        value: Workers, or percent of those at the start of the period.
        period: Seconds, 1 to 1800.

    Raises:
        InvalidPolicy: A value is out of range.
    """

    value: int
    period: float

    def __attrs_post_init__(self) -> None:
        value, period = self.value, self.period
        if not (is_whole(value) and value > 0):
            rate = f"the rate of a {type(self).__name__}"
            raise InvalidPolicy(f"{rate} is {shown(value)}, must be whole and over 0")
        if not (is_number(period) and 0 < period <= 1800):
            raise InvalidPolicy(f"period is {shown(period)} s, must be in (0, 1800]")

    @abc.abstractmethod
    def up(self, start: int) -> int:
        """Return the most workers that growth from *start* may reach."""

    @abc.abstractmethod
    def down(self, start: int) -> int:
        """Return the fewest workers that shrinking from *start* may reach."""


class Count(Rate):
    """So many workers a period; HPA's type Pods.

    >>> Count(4, 15.0).up(10)
    14
    """

    def up(self, start: int) -> int:
        return start + self.value

    def down(self, start: int) -> int:
        return start - self.value


class Percent(Rate):
    """So many percent a period; HPA's type Percent.

    >>> Percent(50, 60.0).up(5), Percent(50, 60.0).down(5)
    (8, 2)
    """

    def up(self, start: int) -> int:
        return math.ceil(start * (1 + self.value / 100))

    def down(self, start: int) -> int:
        return int(start * (1 - self.value / 100))


def _window(instance: Any, attribute: Any, value: float | None) -> None:
    if value is not None and not (is_number(value) and 0 <= value <= 3600):
        raise InvalidPolicy(f"window is {shown(value)} s, must be in [0, 3600]")


@attrs.frozen(kw_only=True)
class Rules:
    """How the count may move in one direction.

    Attributes:
        window: Seconds a wish must last; None: the autoscaler's own default.
        rates: Limits on change; empty means none.
        select: Which of the rates binds.
        tolerance: Part of the target by which a signal may be off in this
            direction with no effect; None: the autoscaler's own default.

    Raises:
        InvalidPolicy: A value is out of range.
    """

    window: float | None = attrs.field(default=None, validator=_window)
    rates: tuple[Rate, ...] = ()
    select: Select = Select.MAX
    tolerance: float | None = None

    def __attrs_post_init__(self) -> None:
        given = self.tolerance
        if given is not None and not (is_number(given) and given >= 0):
            said = f"tolerance is {shown(given)}, must be a number, and not negative"
            raise InvalidPolicy(said)

    @property
    def longest(self) -> float:
        """The longest period of its rates, seconds."""
        return max((rate.period for rate in self.rates), default=0.0)


UP = Rules(window=0.0, rates=(Count(4, 15.0), Percent(100, 15.0)))
DOWN = Rules(rates=(Percent(100, 15.0),))


@attrs.frozen(kw_only=True)
class Behavior:
    """How the count may move, up and down; the defaults are those of HPA v2.

    >>> Behavior().ceiling(10, (), (), 0.0)
    20
    """

    up: Rules = UP
    down: Rules = DOWN

    def ceiling(self, current: int, added: Changes, removed: Changes, at: float) -> int:
        """Return the most workers the rates allow at *at*, never under *current*."""
        return max(_reach(self.up, True, current, added, removed, at), current)

    def floor(self, current: int, added: Changes, removed: Changes, at: float) -> int:
        """Return the fewest the rates allow at *at*, never over *current*."""
        return min(_reach(self.down, False, current, added, removed, at), current)


def _reach(
    rules: Rules,
    up: bool,
    current: int,
    added: Changes,
    removed: Changes,
    at: float,
) -> int:
    if rules.select is Select.DISABLED:
        return current
    if not rules.rates:
        return MOST if up else 0
    reached = []
    for rate in rules.rates:
        since = at - rate.period
        start = current - _sum(added, since) + _sum(removed, since)
        reached.append(rate.up(start) if up else rate.down(start))
    furthest = max if (rules.select is Select.MAX) == up else min
    return furthest(reached)


def _sum(changes: Changes, since: float) -> int:
    return sum([change for at, change in changes if at > since])


def note_change(changes: Changes, at: float, change: int, longest: float) -> Changes:
    """Return *changes* with one more, in place of one too old to count.

    Only the last of those older than *longest* makes room, as upstream has
    it: the other direction's periods, which may be longer, still see the rest.
    """
    outdated = [row for row, (then, _) in enumerate(changes) if then < at - longest]
    if not outdated:
        return (*changes, (at, change))
    row = outdated[-1]
    return (*changes[:row], (at, change), *changes[row + 1 :])
