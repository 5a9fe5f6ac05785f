"""An HPA as an autoscaler of an llmd fleet: workers are its pods."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

import attrs
import numpy as np

from ...errors import InvalidPolicy, MissingRequest, NoSignal, shown
from ...recommendation import Recommendation
from ...types import State, Worker
from ...view import Floats, View
from ..amounts import is_number
from ..interface import Autoscaler
from .controller import History, HpaSpec
from .metrics import Resource, Utilization
from .pods import Phase, Pod, Sample, Scene
from .quantity import Quantity

_log = logging.getLogger("llmd.autoscaler")
_PHASES = {
    State.STARTING: Phase.PENDING,
    State.LOADING: Phase.PENDING,
    State.WARMING: Phase.PENDING,
}

Signal = Callable[[View], Floats | float]
Requests = Mapping[str, Quantity]


def _running(view: View) -> Floats:
    return view.workers.running_requests.astype(np.float64)


def _queue(view: View) -> Floats:
    workers = view.workers
    return np.fmax(workers.waiting_requests, workers.reported_waiting)


def _kv(view: View) -> Floats:
    workers = view.workers
    booked = workers.context_tokens / np.maximum(workers.kv_tokens, 1)
    return np.fmax(booked, workers.reported_kv_usage)


def _mean(signal: Callable[[View], Floats]) -> Callable[[View], float]:
    def mean(view: View) -> float:
        values = signal(view)[view.workers.ready()]
        return float(values.mean()) if len(values) else 0.0

    return mean


SIGNALS: Mapping[str, Signal] = {
    "vllm:num_requests_running": _running,
    "vllm:num_requests_waiting": _queue,
    "vllm:kv_cache_usage_perc": _kv,
    "inference_pool_average_queue_size": _mean(_queue),
    "inference_pool_average_kv_cache_utilization": _mean(_kv),
    "inference_pool_ready_pods": lambda view: float(view.workers.ready().sum()),
    "inference_extension_flow_control_queue_size": lambda view: float(
        len(view.waiting)
    ),
    "inference_objective_running_requests": lambda view: float(
        view.workers.running_requests.sum()
    ),
}
"""Metrics by the names of vLLM and llm-d: shape (W,) for each worker, or one."""


@attrs.define(kw_only=True)
class Hpa(Autoscaler):
    """Runs an HPA's spec on the workers of a fleet.

    A worker that is starting, loading or warming is a pending pod, one that
    drains is being deleted.  Its own bounds and windows are the spec's; those
    of the base class are not used.  From zero it wakes as upstream does, by an
    Object or External metric that sees the queue, not because a request waits.

    Attributes:
        spec: Built by hand or read by `llmd.adapters.hpa_manifest`.
        interval: Seconds between two passes.
        signals: Metrics by name, besides the known ones: one number, or (W,).
            One that fails cannot be had, and the others count.  An underscore
            in a manifest stands for any sign that metric names cannot have
            there.  Resources go by their names, those of one container by
            "container/resource".
        requests: What a worker requests of each resource, by the same names,
            or what tells so of a worker; a target of type Utilization is a
            part of it.

    Raises:
        MissingRequest: A metric aims at a part of a request that `requests`
            does not have.  One that a callable leaves out only shows in
            `advice`, and holds the count: upstream's FailedGetResourceMetric.

    >>> from llmd.autoscaler.hpa import AverageValue, Pods
    >>> metric = Pods("vllm:num_requests_waiting", AverageValue(5))
    >>> Hpa(spec=HpaSpec(max_replicas=4, metrics=(metric,))).interval
    15.0
    """

    spec: HpaSpec
    interval: float = 15.0
    signals: Mapping[str, Signal] = attrs.field(factory=dict)
    requests: Requests | Callable[[Worker], Requests] = attrs.field(factory=dict)
    _history: History = attrs.field(factory=History, init=False)
    _next: float = attrs.field(default=-math.inf, init=False)
    _failed: dict[str, str] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self.min_workers = self.spec.min_replicas
        self.max_workers = self.spec.max_replicas
        super().__attrs_post_init__()
        if not (is_number(self.interval) and 0 <= self.interval < math.inf):
            raise InvalidPolicy(f"interval is {shown(self.interval)}, must be seconds")
        if not callable(self.requests):
            self._check(self.requests)

    def wanted(self, view: View) -> float:
        return float(self.recommend(view).workers)

    def recommend(self, view: View) -> Recommendation:
        if self.advice is not None and view.now < self._next:
            return self.advice
        advice, self._history = self.spec.step(self._history, self.scene(view))
        self._next = view.now + self.interval
        self._asked, self.advice = advice.workers, advice
        return advice

    def scene(self, view: View) -> Scene:
        """Return what the HPA sees of the fleet."""
        workers = view.workers
        asked = self.requests
        pods = [
            self._pod(worker.id, state, asked(worker) if callable(asked) else asked)
            for worker, state in zip(workers.facts, workers.states, strict=True)
        ]
        samples: dict[str, dict[str, Sample]] = {}
        values: dict[str, tuple[float]] = {}
        faults: dict[str, str] = {}
        for metric in self.spec.metrics:
            key = metric.key if isinstance(metric, Resource) else metric.name
            try:
                measured = self._measured(key, view)
            except NoSignal as error:
                faults[key] = str(error)
                continue
            if measured.ndim:
                samples[key] = _samples(view, measured)
            total = float(np.nansum(measured))
            if math.isfinite(total):
                values[key] = (total,)
        return Scene(
            now=view.now,
            # A fleet that was never asked for anything is not one that rests.
            replicas=max(self._current(view), 1)
            if self._asked is None
            else self._asked,
            present=int(workers.supply().sum()),
            pods=pods,
            samples=samples,
            values=values,
            faults=faults,
        )

    def _measured(self, key: str, view: View) -> Floats:
        """Ask a signal, for one number or (W,); one that fails cannot be had."""
        try:
            measured = np.asarray(self._signal(key)(view), dtype=np.float64)
            if measured.shape not in ((), (len(view.workers),)):
                wrong = f"shape {measured.shape}, want {(len(view.workers),)} or one"
                raise ValueError(wrong)
            if not measured.ndim and not math.isfinite(measured):
                raise NoSignal(f"the signal is {measured}")
        except NoSignal:
            raise
        except Exception as error:
            said = f"the signal failed: {type(error).__name__}: {error}"
            if self._failed.get(key) != said:
                self._failed[key] = said
                _log.warning("%s: %s", key, said)
            raise NoSignal(said) from error
        return measured

    def _pod(self, name: str, state: State, requests: Requests) -> Pod:
        """Return the pod that a worker is."""
        whole: dict[str, Quantity] = {}
        containers: dict[str, dict[str, Quantity]] = {}
        for metric in self._resources:
            if metric.key in requests:
                container = metric.container
                place = containers.setdefault(container, {}) if container else whole
                place[metric.name] = requests[metric.key]
        return Pod(
            name=name,
            phase=_PHASES.get(state, Phase.RUNNING),
            deleted=state is State.DRAINING or state is State.SLEEPING,
            ready=state is State.READY,
            containers=containers,
            requests=whole,
        )

    @property
    def _resources(self) -> list[Resource]:
        return [m for m in self.spec.metrics if isinstance(m, Resource)]

    def _check(self, requests: Requests) -> None:
        """Refuse what would hold the count for ever."""
        pod = self._pod("each worker", State.READY, requests)
        for metric in self._resources:
            if not isinstance(metric.target, Utilization):
                continue
            try:
                requested = metric.requests([pod])[pod.name]
            except NoSignal:
                requested = 0
            if requested <= 0:
                raise MissingRequest(
                    f"{metric.key} is to be at {metric.target.percent} % of what a"
                    f" worker requests, and nothing says how much that is: give"
                    f" requests={{{metric.key!r}: ...}}, or aim at an AverageValue"
                )

    def _signal(self, key: str) -> Signal:
        for names in (self.signals, SIGNALS):
            for name, signal in names.items():
                if key in (name, name.replace(":", "_")):
                    return signal
        raise NoSignal(f"no signal {key!r}")


def _samples(view: View, measured: Floats) -> dict[str, Sample]:
    return {
        worker: Sample(value, at=view.now)
        for worker, value in zip(view.workers.ids, measured.tolist(), strict=True)
        if math.isfinite(value)
    }
