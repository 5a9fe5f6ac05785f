"""An HPA in this process, its pods the workers of a fleet."""

import attrs
import numpy as np
import pytest

from llmd.autoscaler.hpa import (
    AverageValue,
    External,
    Hpa,
    HpaSpec,
    Pods,
    Resource,
    Utilization,
)
from llmd.errors import InvalidPolicy, MissingRequest
from llmd.types import State

SPEC = HpaSpec(max_replicas=3, metrics=(Pods("x", AverageValue(1)),))


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


def raises(view):
    return 1 / 0


@pytest.mark.parametrize(
    ("signal", "why"),
    [
        (raises, "ZeroDivisionError: division by zero"),
        (lambda view: np.zeros(99), r"shape (99,), want (1,) or one"),
        (lambda view: [1.0] * 99, "shape (99,), want (1,) or one"),
        (lambda view: "many", "could not convert string to float: 'many'"),
        (lambda view: np.nan, "the signal is nan"),
    ],
    ids=["raises", "wrong shape", "a list", "a text", "a NaN"],
)
def test_a_signal_that_fails_is_one_metric_that_cannot_be_had(make_bench, signal, why):
    metrics = (Pods("bad", AverageValue(1)), Pods("good", AverageValue(1)))
    policy = Hpa(
        spec=HpaSpec(max_replicas=9, metrics=metrics),
        signals={"bad": signal, "good": lambda view: np.full(len(view.workers), 3.0)},
    )
    advice = policy.recommend(make_bench(1).view)
    assert advice.workers == 3  # the other still lets it grow
    [told] = [line for line in advice.explain().splitlines() if "bad" in line]
    assert told.startswith("  Pods bad cannot tell: ")
    assert told.endswith(why)


def test_a_list_of_each_worker_will_do(make_bench):
    metric = Pods("busy", AverageValue(1))
    policy = Hpa(
        spec=HpaSpec(max_replicas=9, metrics=(metric,)),
        signals={"busy": lambda view: [3.0] * len(view.workers)},
    )
    assert policy.target(make_bench(1).view) == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: Hpa(spec=SPEC, interval=np.nan),
        lambda: Hpa(spec=SPEC, interval=np.inf),
        lambda: Hpa(spec=SPEC, interval="15"),
        lambda: attrs.evolve(SPEC, max_replicas=2.5),
        lambda: attrs.evolve(SPEC, max_replicas=None),
        lambda: attrs.evolve(SPEC, min_replicas="1"),
        lambda: attrs.evolve(SPEC, tolerance="0.1"),
        lambda: Utilization(np.nan),
    ],
)
def test_numbers_that_are_none_are_refused(make):
    with pytest.raises(InvalidPolicy):
        make()


def test_an_hpa_at_zero_wakes_by_a_metric_that_sees_the_queue(make_bench):
    """As upstream: by its own metrics, and by nothing else."""
    counts = []
    for name in ("inference_extension_flow_control_queue_size", "no such metric"):
        metric = External(name, AverageValue(5))
        spec = HpaSpec(min_replicas=0, max_replicas=4, metrics=(metric,))
        scaler, bench = Hpa(spec=spec, interval=1.0), make_bench(0)
        scaler.target(bench.view)
        scaler._asked = 0
        bench.arrive(6)
        bench.wait(1.0)
        counts.append(scaler.target(bench.view))
    assert counts == [2, 0]
