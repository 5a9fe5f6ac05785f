"""Who has the GPU: the `TimeSlice` interface and what it sees."""

from __future__ import annotations

import abc
import math

import attrs
import numpy as np

from ..errors import InvalidSlice


@attrs.frozen(kw_only=True)
class Slot:
    """One engine of a GPU, at one moment.

    Attributes:
        engine: Its name.
        weight: Its share of the GPU's time, relative to the others'.
        requests: That it has, waiting, running and frozen.
        band: The smallest `Request.priority` among them; smaller is more
            urgent.
        deadline: When the most urgent one that waits must be on the GPU, by
            its own deadline less its prefill; inf if none presses.
        since: When it last had the GPU, or when it last began to have
            requests, whichever is later.
        resident: Its weights are in GPU memory.
        switch_s: Seconds until it would run if it were chosen now.
        usual_switch_s: Seconds that a turn of it costs as a rule, from the
            other's last step to its own first.
    """

    engine: str
    weight: float = 1.0
    requests: int = 0
    band: int = 0
    deadline: float = math.inf
    since: float = 0.0
    resident: bool = True
    switch_s: float = 0.0
    usual_switch_s: float = 0.0

    def slack_s(self, now: float) -> float:
        """Return the seconds it can still wait before it must be chosen."""
        return self.deadline - now - self.switch_s


@attrs.frozen(kw_only=True)
class GpuView:
    """Everything a time slice may base a decision on.

    Attributes:
        now: Current time, seconds.
        rng: The only source of randomness a policy may use.
        slots: The engines, in order of their names.
        running: Who has the GPU; None between two turns.
        turn_s: How long it has had it, seconds.
    """

    now: float
    rng: np.random.Generator = attrs.field(eq=False, repr=False)
    slots: tuple[Slot, ...] = ()
    running: str | None = None
    turn_s: float = 0.0

    def slot(self, engine: str) -> Slot:
        """Return the slot of *engine*.

        Raises:
            InvalidSlice: It is not there.
        """
        for slot in self.slots:
            if slot.engine == engine:
                return slot
        raise InvalidSlice(f"no engine {engine!r} on this GPU")

    @property
    def wanting(self) -> tuple[Slot, ...]:
        """The engines that have requests."""
        return tuple([slot for slot in self.slots if slot.requests > 0])


@attrs.frozen
class Turn:
    """A decision.

    Attributes:
        engine: Who has the GPU from now on; None leaves it idle.
        seconds: When to ask again at the latest; whatever happens asks earlier.
    """

    engine: str | None
    seconds: float = math.inf


class TimeSlice(abc.ABC):
    """Decides which engine of one GPU runs, and for how long.

    It is asked whenever something may have changed: requests came or ended, a
    turn's seconds are over, an engine came or died.  To answer with the engine
    that runs lets it go on.  To answer with another stops it at its next step
    boundary and asks once more, with nobody running: the answer to that one
    counts, so that what happened meanwhile is seen.  One that raises, or answers
    what makes no sense, is blamed and asked again soon; see `GpuArbiter`.

    >>> class LongestQueue(TimeSlice):
    ...     def next(self, view):
    ...         if not view.wanting:
    ...             return Turn(view.running)
    ...         most = max(view.wanting, key=lambda slot: slot.requests)
    ...         return Turn(most.engine, 0.1)
    """

    @abc.abstractmethod
    def next(self, view: GpuView) -> Turn:
        """Return who has the GPU from now on."""

    def ran(self, engine: str, run_s: float, switch_s: float, view: GpuView) -> None:
        """Note that a turn ended: it ran *run_s*, and took *switch_s* to begin."""

    def left(self, engine: str) -> None:
        """Note that *engine* is gone for good; its name may come again."""

    def upcoming(self, view: GpuView) -> tuple[str, ...]:
        """Return the engines in the order in which they may be expected to run.

        Used to load weights ahead of a turn and to choose whose to put away:
        a wrong guess costs time, never correctness.
        """
        wanting = sorted(view.wanting, key=lambda slot: (slot.since, slot.engine))
        idle = [slot for slot in view.slots if slot.requests == 0]
        return tuple([slot.engine for slot in (*wanting, *idle)])

    def complaint(self, view: GpuView) -> Infeasible | None:
        """Return what cannot be met with these engines on one GPU, if anything."""
        return None


@attrs.frozen(kw_only=True)
class Infeasible:
    """A target that one GPU cannot meet, for the autoscaler to act on.

    Attributes:
        reason: The arithmetic, in words.
        engines: How many there are.
        engines_that_fit: How many could share a GPU and still meet the target.
    """

    reason: str
    engines: int
    engines_that_fit: int
