"""An HPA in this process, its pods the workers of a fleet."""

import numpy as np
import pytest

from llmd.autoscaler.hpa import AverageValue, Hpa, HpaSpec, Pods, Resource, Utilization
from llmd.errors import InvalidPolicy, MissingRequest
from llmd.types import State


def test_an_hpa_follows_the_workers_of_a_fleet(make_bench):
    metric = Pods("vllm:num_requests_running", AverageValue(5))
    scaler = Hpa(spec=HpaSpec(max_replicas=4, metrics=(metric,)))
    bench = make_bench(1)
    bench.load(20)
    assert scaler.target(bench.view) == 4
    for _ in range(3):
        bench.join(State.WARMING)
    bench.wait(15.0)
    assert scaler.target(bench.view) == 4  # starting ones are pending, not idle
    bench.load(0)
    for name in bench.there:
        bench.change(name, State.READY)
    counts = []
    for _ in range(30):
        bench.wait(15.0)
        counts.append(scaler.target(bench.view))
    assert counts[0] == 4
    assert counts[-1] == 1
    assert sorted(counts, reverse=True) == counts


def test_an_hpa_looks_only_every_so_often(make_bench):
    metric = Pods("vllm_num_requests_running", AverageValue(5))
    scaler = Hpa(spec=HpaSpec(max_replicas=4, metrics=(metric,)))
    bench = make_bench(1)
    assert scaler.target(bench.view) == 1
    bench.load(20)
    bench.wait(14.0)
    assert scaler.target(bench.view) == 1
    bench.wait(1.0)
    assert scaler.target(bench.view) == 4


# Requests -------------------------------------------------------------------

CPU, MAIN = Resource("cpu", Utilization(50)), Resource("cpu", Utilization(50), "main")


def busy(cores):
    """Return a signal: each worker uses so many cores."""
    return lambda view: np.full(len(view.workers), float(cores))


def make_hpa(metric, requests, used=3):
    return Hpa(
        spec=HpaSpec(max_replicas=9, metrics=(metric,)),
        signals={metric.key: busy(used)},
        requests=requests,
    )


@pytest.mark.parametrize(
    ("metric", "requests"),
    [
        (CPU, {"cpu": 4}),
        (CPU, {"cpu": "4000m", "memory": "8Gi"}),
        (CPU, lambda worker: {"cpu": 4 if worker.id else 0}),
        (MAIN, {"main/cpu": 4, "cpu": 99}),
        (Resource("example.com/core", Utilization(50)), {"example.com/core": 4}),
    ],
)
def test_use_is_a_part_of_what_workers_request(make_bench, metric, requests):
    scaler, bench = make_hpa(metric, requests), make_bench(2)
    assert scaler.target(bench.view) == 3  # 3 of 4 cores, at 50 %: 2 * 1.5


@pytest.mark.parametrize(
    ("metric", "requests"),
    [
        (CPU, {}),
        (CPU, {"memory": "8Gi"}),
        (CPU, {"cpu": 0}),
        (MAIN, {"cpu": 4}),
        (MAIN, {"other/cpu": 4}),
    ],
)
def test_a_part_of_nothing_is_refused_when_it_is_built(metric, requests):
    with pytest.raises(MissingRequest, match=f"requests=.'{metric.key}'"):
        make_hpa(metric, requests)
    assert issubclass(MissingRequest, InvalidPolicy)


def test_a_worker_without_a_request_is_told_of(make_bench):
    """As upstream's FailedGetResourceMetric: the count stays, and says why."""
    scaler = make_hpa(CPU, lambda worker: {} if worker.id == "w0001" else {"cpu": 4})
    assert scaler.target(make_bench(2).view) == 2
    assert "cannot tell: pod 'w0001' requests no cpu" in scaler.advice.explain()


def test_an_average_needs_no_requests(make_bench):
    scaler = make_hpa(Resource("cpu", AverageValue(2)), {})
    assert scaler.target(make_bench(2).view) == 3


@pytest.mark.parametrize(
    "signal",
    [lambda view: 1 / 0, lambda view: np.zeros(99), lambda view: [1.0] * 99],
    ids=["raises", "wrong shape", "a list"],
)
def test_a_signal_that_fails_is_one_metric_that_cannot_be_had(make_bench, signal):
    metrics = (Pods("bad", AverageValue(1)), Pods("good", AverageValue(1)))
    policy = Hpa(
        spec=HpaSpec(max_replicas=9, metrics=metrics),
        signals={"bad": signal, "good": lambda view: np.full(len(view.workers), 3.0)},
    )
    advice = policy.recommend(make_bench(1).view)
    assert advice.workers == 3  # the other still lets it grow
    assert "bad" in advice.explain()
