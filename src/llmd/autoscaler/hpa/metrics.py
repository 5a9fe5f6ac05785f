"""The metric kinds of HPA v2, each a pure function from a scene to a count."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs

from ...errors import InvalidPolicy, NoSignal, shown
from ..amounts import is_whole
from .calculator import (
    Tolerance,
    average,
    by_pod,
    by_share,
    by_value,
    requests_of,
    utilization,
)
from .pods import Pod, Sample, Scene
from .quantity import milli


def _positive(instance: Any, attribute: Any, value: int) -> None:
    if not (is_whole(value) and value > 0):
        raise InvalidPolicy(f"a target of {shown(value)} cannot be met")


@attrs.frozen
class Value:
    """Keep the metric itself at an amount.

    Attributes:
        milli: In thousandths; any quantity is taken.

    >>> Value("10k").milli
    10000000
    """

    milli: int = attrs.field(converter=milli, validator=_positive)


@attrs.frozen
class AverageValue:
    """Keep the metric, divided by the pods, at an amount.

    Attributes:
        milli: In thousandths; any quantity is taken.

    >>> AverageValue("500m").milli
    500
    """

    milli: int = attrs.field(converter=milli, validator=_positive)


@attrs.frozen
class Utilization:
    """Keep the use of a resource at so many percent of what pods request.

    >>> Utilization(80).percent
    80
    """

    percent: int = attrs.field(validator=_positive)


class Metric(abc.ABC):
    """One entry of `spec.metrics`."""

    name: str

    @abc.abstractmethod
    def count(self, scene: Scene, tolerance: Tolerance) -> int:
        """Return the pods that this metric alone asks for.

        Raises:
            NoSignal: It cannot be told.
        """


@attrs.frozen
class Resource(Metric):
    """Use of CPU or memory by pods, or by one container of each.

    >>> from llmd.autoscaler.hpa import Pod
    >>> metric = Resource("cpu", Utilization(50))
    >>> pod = Pod(name="a", containers={"main": {"cpu": 1}})
    >>> scene = Scene(now=0, replicas=1, pods=[pod], samples={"cpu": {"a": Sample(2)}})
    >>> metric.count(scene, Tolerance())
    4
    """

    name: str
    target: Utilization | AverageValue
    container: str = ""

    @property
    def key(self) -> str:
        """Where a scene's samples of it are."""
        return f"{self.container}/{self.name}" if self.container else self.name

    def requests(self, pods: Sequence[Pod]) -> dict[str, int]:
        """Return what each pod requests of it, in thousandths.

        Raises:
            NoSignal: One of them requests none, or has no such container.
        """
        return requests_of(pods, self.name, self.container)

    def count(self, scene: Scene, tolerance: Tolerance) -> int:
        samples = _samples(scene, self.key)
        count = partial(by_pod, scene, samples, tolerance, cpu=self.name == "cpu")
        if isinstance(self.target, AverageValue):
            target = self.target.milli
            return count(
                ratio=lambda use: average(use, target), missing=lambda pod: target
            )
        requests = self.requests(scene.pods)
        percent = self.target.percent
        return count(
            ratio=lambda use: utilization(use, requests, percent),
            missing=lambda pod: requests[pod.name] * max(100, percent) // 100,
        )


@attrs.frozen
class Pods(Metric):
    """A metric that each pod has, such as requests in flight."""

    name: str
    target: AverageValue

    def count(self, scene: Scene, tolerance: Tolerance) -> int:
        target = self.target.milli
        return by_pod(
            scene,
            _samples(scene, self.name),
            tolerance,
            cpu=False,
            ratio=lambda use: average(use, target),
            missing=lambda pod: target,
        )


@attrs.frozen
class Series(Metric):
    """A metric of no pod: of another object, or from outside the cluster."""

    name: str
    target: Value | AverageValue

    def count(self, scene: Scene, tolerance: Tolerance) -> int:
        if self.name not in scene.values:
            raise NoSignal(scene.faults.get(self.name, f"no value of {self.name!r}"))
        by: Callable[..., int]
        by = by_value if isinstance(self.target, Value) else by_share
        use = sum(scene.values[self.name])
        return by(scene, use, self.target.milli, tolerance)


class Object(Series):
    """A metric of one other object, such as an ingress or an InferencePool."""


class External(Series):
    """A metric from outside the cluster, summed over its series.

    >>> metric = External("queue", AverageValue(30))
    >>> metric.count(Scene(now=0, replicas=0, values={"queue": [60, 1]}), Tolerance())
    3
    """


def _samples(scene: Scene, key: str) -> Mapping[str, Sample]:
    if key not in scene.samples:
        raise NoSignal(scene.faults.get(key, f"no samples of {key!r}"))
    return scene.samples[key]
