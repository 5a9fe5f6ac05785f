"""What happens to the engines of one GPU, and what to do with them."""

from __future__ import annotations

import enum
import math

import attrs

from ..errors import InvalidSlice, LlmdError
from ..machines import Machine, Switching
from .amounts import amount
from .interface import Infeasible


class Action(enum.Enum):
    """What a driver does to an engine; each ends in `Done`, `Failed` or `Left`."""

    PAUSE = "pause"
    RESUME = "resume"
    SLEEP = "sleep"
    WAKE = "wake"


@attrs.frozen(kw_only=True)
class Sharer:
    """An engine that shares a GPU, as it joins.

    Attributes:
        engine: Its name.
        weight: Its share of time, relative to the others'.
        awake_bytes: GPU memory it holds while its weights are there.
        asleep_bytes: GPU memory it holds while asleep.
        pause_s: Expected seconds to pause, its last step not counted; measured
            ones replace it.
        resume_s: To resume.
        sleep_s: To sleep.
        wake_s: To wake, up to where it can resume.
    """

    engine: str
    weight: float = attrs.field(default=1.0, validator=amount())
    awake_bytes: float = attrs.field(default=0.0, validator=amount())
    asleep_bytes: float = attrs.field(default=0.0, validator=amount())
    pause_s: float = attrs.field(default=0.0, validator=amount())
    resume_s: float = attrs.field(default=0.02, validator=amount())
    sleep_s: float = attrs.field(default=0.4, validator=amount())
    wake_s: float = attrs.field(default=0.7, validator=amount())

    def __attrs_post_init__(self) -> None:
        if not self.engine or not self.weight > 0:
            raise InvalidSlice(f"{self!r} needs a name and a weight above 0")

    @classmethod
    def on(
        cls, engine: str, machine: Machine, switching: Switching, kv_bytes: float = 0.0
    ) -> Sharer:
        """Expect what *machine* and *switching* say, with *kv_bytes* of cache.

        A pause ends with the step it waits for; what it costs beyond that is
        counted before the next engine runs.
        """
        hardware, weights = machine.hardware, machine.weights_bytes
        return cls(
            engine=engine,
            awake_bytes=weights + kv_bytes,
            pause_s=0.0,
            resume_s=switching.pause_s,
            sleep_s=switching.sleep_s(hardware, weights),
            wake_s=switching.wake_s(hardware, weights),
        )


@attrs.frozen
class GpuEvent:
    """Something that happened.

    Attributes:
        at: When, in seconds on the driver's clock.
    """

    at: float


@attrs.frozen
class Joined(GpuEvent):
    """An engine is there, and free to run until it is told to pause.

    Attributes:
        asleep: It is there but sleeps.
    """

    sharer: Sharer
    asleep: bool = False


@attrs.frozen
class Left(GpuEvent):
    """An engine is gone, for whatever reason, and its memory is free."""

    engine: str


@attrs.frozen
class Wanted(GpuEvent):
    """An engine's requests changed.

    Attributes:
        requests: Waiting, running and frozen.
        band: The smallest priority among them.
        deadline: When the most urgent one that waits must be on the GPU.
    """

    engine: str
    requests: int
    band: int = 0
    deadline: float = math.inf


@attrs.frozen
class Done(GpuEvent):
    """The engine did what it was told."""

    engine: str
    action: Action


@attrs.frozen
class Failed(GpuEvent):
    """The engine could not do what it was told."""

    engine: str
    action: Action
    error: str


@attrs.frozen
class Asked(GpuEvent):
    """Time passed: `GpuArbiter.alarm` went off."""


@attrs.frozen
class GpuCommand:
    """Something to be done."""


@attrs.frozen
class Do(GpuCommand):
    """Do *action* to *engine* and say `Done` or `Failed`."""

    engine: str
    action: Action


@attrs.frozen
class Lost(GpuCommand):
    """Stop *engine*, fail or move its requests, and say `Left`."""

    engine: str
    reason: str


@attrs.frozen
class Complain(GpuCommand):
    """Tell the autoscaler what this GPU cannot do; None: all is well again."""

    what: Infeasible | None


@attrs.frozen
class Blame(GpuCommand):
    """Report what the policy did wrong; it is asked again when `alarm` says."""

    error: LlmdError


@attrs.frozen(kw_only=True)
class TurnTaken:
    """One turn, for a timeline.

    Attributes:
        engine: Who had the GPU.
        chosen_at: When the switch to it began.
        began_at: When it ran.
        ended_at: When it was paused, or gone.
    """

    engine: str
    chosen_at: float
    began_at: float
    ended_at: float

    @property
    def run_s(self) -> float:
        """How long it ran."""
        return self.ended_at - self.began_at
