"""An HPA in this process, its pods the workers of a fleet."""

from llmd.autoscaler.hpa import AverageValue, Hpa, HpaSpec, Pods
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
