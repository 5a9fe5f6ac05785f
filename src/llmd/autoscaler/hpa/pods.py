"""What an HPA looks at: pods, samples, and the moment it looks."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence

import attrs

from .quantity import Quantity, milli


class Phase(enum.Enum):
    """How far a pod is, by Kubernetes' word."""

    PENDING = "Pending"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


def _requests(given: Mapping[str, Quantity]) -> dict[str, int]:
    return {resource: milli(quantity) for resource, quantity in given.items()}


def _containers(
    given: Mapping[str, Mapping[str, Quantity]],
) -> dict[str, dict[str, int]]:
    return {name: _requests(requests) for name, requests in given.items()}


def _series(given: Mapping[str, Sequence[Quantity]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(map(milli, series)) for name, series in given.items()}


@attrs.frozen(kw_only=True)
class Pod:
    """A pod as far as an HPA cares.

    Attributes:
        name: Unique among the pods of one target.
        phase: How far it is.
        deleted: Whether it is on its way out.
        ready: Its Ready condition; None if it has none.
        ready_since: When that condition last changed, seconds.
        started_at: When it was started, seconds; None if it was not.
        containers: Requests by container and resource, in thousandths
            (restartable init containers count, others do not).
        requests: Requests by resource of the pod as a whole; if given, they
            stand for its containers'.

    >>> Pod(name="a", containers={"main": {"cpu": "500m"}}).containers
    {'main': {'cpu': 500}}
    """

    name: str
    phase: Phase = Phase.RUNNING
    deleted: bool = False
    ready: bool | None = True
    ready_since: float = -math.inf
    started_at: float | None = -math.inf
    containers: Mapping[str, Mapping[str, int]] = attrs.field(
        factory=dict, converter=_containers
    )
    requests: Mapping[str, int] = attrs.field(factory=dict, converter=_requests)

    @property
    def ignored(self) -> bool:
        """Whether it counts for nothing: on its way out or ended."""
        return self.deleted or self.phase in (Phase.SUCCEEDED, Phase.FAILED)

    @property
    def serving(self) -> bool:
        """Whether it runs and is ready."""
        return self.phase is Phase.RUNNING and self.ready is True


@attrs.frozen
class Sample:
    """One pod's measurement.

    Attributes:
        milli: Of what was measured, in thousandths; any quantity is taken.
        at: End of the time measured over, seconds.
        window: Length of that time, seconds.

    >>> Sample("1500m").milli, Sample(1.5).milli
    (1500, 1500)
    """

    milli: int = attrs.field(converter=milli)
    at: float = 0.0
    window: float = 60.0


@attrs.frozen(kw_only=True)
class Scene:
    """All that an HPA sees at one moment.

    Attributes:
        now: Seconds.
        replicas: Pods asked for.
        pods: Pods there are.
        present: Pods the target's status counts; those in `pods` if None.
        samples: By metric, then by pod.  A metric that is not there could not
            be had at all.  A container's resource goes by "container/resource".
        values: Of Object and External metrics, in thousandths, one for each
            series; any quantity is taken.
        faults: Why metrics could not be had, in words, by the same names.
    """

    now: float
    replicas: int
    pods: Sequence[Pod] = ()
    present: int | None = None
    samples: Mapping[str, Mapping[str, Sample]] = attrs.field(factory=dict)
    values: Mapping[str, Sequence[int]] = attrs.field(factory=dict, converter=_series)
    faults: Mapping[str, str] = attrs.field(factory=dict)

    @property
    def status_replicas(self) -> int:
        """Pods there are, by the target's own count."""
        return len(self.pods) if self.present is None else self.present
