"""From measurements to a count: the replica calculator of HPA v2.

Rules: kubernetes/kubernetes pkg/controller/podautoscaler/replica_calculator.go
and metrics/utilization.go.  Values are whole thousandths and are divided as
integers where upstream divides integers, so counts agree to the last pod.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import attrs

from ...errors import NoSignal
from ..behavior import MOST
from .pods import Phase, Pod, Sample, Scene


@attrs.frozen(kw_only=True)
class Tolerance:
    """How far use may be off its target with no effect.

    Attributes:
        up: Above it, as a part of the target.
        down: Below it.
        cpu_initialization: Seconds after its start in which a pod's CPU
            samples count only if they are newer than its readiness.
        readiness_delay: Seconds after its start in which a pod that turns
            unready counts as one that was never ready.
    """

    up: float = 0.1
    down: float = 0.1
    cpu_initialization: float = 300.0
    readiness_delay: float = 30.0

    def holds(self, ratio: float) -> bool:
        """Say whether *ratio* of use to target is close enough to 1."""
        return 1.0 - self.down <= ratio <= 1.0 + self.up


@attrs.define
class _Groups:
    """Pods by what their samples are worth."""

    ready: int = 0
    unready: list[Pod] = attrs.field(factory=list)
    missing: list[Pod] = attrs.field(factory=list)
    use: dict[str, int] = attrs.field(factory=dict)


def by_pod(
    scene: Scene,
    samples: Mapping[str, Sample],
    tolerance: Tolerance,
    *,
    cpu: bool,
    ratio: Callable[[Mapping[str, int]], float],
    missing: Callable[[Pod], int],
) -> int:
    """Return the count that brings the average use of pods to its target.

    Args:
        scene: What is seen.
        samples: By pod.
        tolerance: What is close enough.
        cpu: Whether readiness matters, as it does for CPU alone.
        ratio: From use by pod to the ratio of use to target.
        missing: What a pod without a sample is taken to use when the rest
            would shrink the count.

    Raises:
        NoSignal: No pod has a sample that counts.
    """
    groups = _group(scene, samples, tolerance, cpu)
    if not groups.use:
        raise NoSignal("no pod that counts has a sample (they may be unready)")
    use, first = dict(groups.use), ratio(groups.use)
    unready = bool(groups.unready) and first > 1.0
    if not unready and not groups.missing:
        if tolerance.holds(first):
            return scene.replicas
        return _count(first * groups.ready)
    if first != 1.0:
        for pod in groups.missing:
            use[pod.name] = missing(pod) if first < 1.0 else 0
    if unready:
        use |= {pod.name: 0 for pod in groups.unready}
    second = ratio(use)
    if tolerance.holds(second) or (first < 1.0 < second) or (second < 1.0 < first):
        return scene.replicas
    count = _count(second * len(use))
    against = count > scene.replicas if second < 1.0 else count < scene.replicas
    return scene.replicas if against else count


def utilization(
    use: Mapping[str, int], requests: Mapping[str, int], percent: int
) -> float:
    """Return the ratio of use, as percent of what was requested, to *percent*.

    Raises:
        NoSignal: Nothing was requested.
    """
    requested = sum([requests[pod] for pod in use if pod in requests])
    if not requested:
        raise NoSignal("the pods that have samples request nothing")
    used = sum([amount for pod, amount in use.items() if pod in requests])
    return _quotient(used * 100, requested) / percent


def average(use: Mapping[str, int], target: int) -> float:
    """Return the ratio of the mean use, cut to whole thousandths, to *target*."""
    return _quotient(sum(use.values()), len(use)) / target


def requests_of(pods: Sequence[Pod], resource: str, container: str) -> dict[str, int]:
    """Return what each pod requests of *resource*, in thousandths.

    Raises:
        NoSignal: One of them requests none, or has no such container.
    """
    found = {}
    for pod in pods:
        if pod.requests and not container:
            found[pod.name] = _requested(pod.requests, resource, pod.name)
            continue
        names = [container] if container else list(pod.containers)
        if not names:
            raise NoSignal(f"pod {pod.name!r} requests no {resource}")
        if container and container not in pod.containers:
            raise NoSignal(f"pod {pod.name!r} has no container {container!r}")
        found[pod.name] = sum(
            [_requested(pod.containers[name], resource, pod.name) for name in names]
        )
    return found


def by_value(scene: Scene, use: int, target: int, tolerance: Tolerance) -> int:
    """Return the count that brings one value for all pods to *target*.

    Raises:
        NoSignal: There is no pod to count from.
    """
    ratio = use / target
    if scene.replicas == 0:
        return _count(ratio)
    if tolerance.holds(ratio):
        return scene.replicas
    if not scene.pods:
        raise NoSignal("there is no pod to count from")
    return _count(ratio * sum([pod.serving for pod in scene.pods]))


def by_share(scene: Scene, use: int, target: int, tolerance: Tolerance) -> int:
    """Return the count that brings each pod's share of a value to *target*."""
    present = scene.status_replicas
    if present and tolerance.holds(use / (target * present)):
        return present
    return _count(use / target)


def _group(
    scene: Scene, samples: Mapping[str, Sample], tolerance: Tolerance, cpu: bool
) -> _Groups:
    if not scene.pods:
        raise NoSignal("there is no pod to count from")
    groups = _Groups()
    known = {pod.name for pod in scene.pods}
    groups.use = {
        name: sample.milli for name, sample in samples.items() if name not in known
    }
    for pod in scene.pods:
        sample = samples.get(pod.name)
        if pod.ignored:
            continue
        if pod.phase is Phase.PENDING:
            groups.unready.append(pod)
        elif sample is None:
            groups.missing.append(pod)
        elif cpu and _unready(pod, sample, scene.now, tolerance):
            groups.unready.append(pod)
        else:
            groups.ready += 1
            groups.use[pod.name] = sample.milli
    return groups


def _unready(pod: Pod, sample: Sample, now: float, tolerance: Tolerance) -> bool:
    """Say whether a CPU sample may show the start of a pod and not its load."""
    if pod.ready is None or pod.started_at is None:
        return True
    if pod.started_at + tolerance.cpu_initialization > now:
        return not pod.ready or sample.at < pod.ready_since + sample.window
    return (
        not pod.ready and pod.started_at + tolerance.readiness_delay > pod.ready_since
    )


def _requested(requests: Mapping[str, int], resource: str, pod: str) -> int:
    if resource not in requests:
        raise NoSignal(f"pod {pod!r} requests no {resource}")
    return requests[resource]


def _quotient(dividend: int, divisor: int) -> int:
    """Divide as Go does: towards zero, and exactly."""
    size = abs(dividend) // abs(divisor)
    return size if (dividend < 0) == (divisor < 0) else -size


def _count(pods: float) -> int:
    return min(math.ceil(pods), MOST)
