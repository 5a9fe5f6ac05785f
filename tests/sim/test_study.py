"""Comparisons and capacities: paired, honest about overload, and reproducible."""

import json
import math

import attrs
import numpy as np
import pytest

import llmd
from llmd.errors import InvalidRequest
from llmd.sim import Slo, capacities, capacity, compare, plots, simulate, workloads
from llmd.sim.benchmark_report import benchmark_report
from llmd.sim.bootstrap import interval, mean, percentile_of

LOAD = workloads.shared_prefix(
    rate=6.0, requests=200, groups=10, answer_tokens=60, seed=1
)


def test_arrivals_are_paired_and_processes_change_nothing():
    policies = {"rr": llmd.RoundRobin(), "delay": llmd.LeastDelay()}
    study = compare(policies, LOAD, seeds=2, workers=3)
    again = compare(policies, LOAD, seeds=2, workers=3, jobs=2)
    for policy in policies:
        for one, other in zip(
            study.reports[policy], again.reports[policy], strict=True
        ):
            assert (one.ttfts == other.ttfts).all()
    ours, first = study.reports["delay"], study.reports["rr"]
    for one, other in zip(ours, first, strict=True):
        assert (one.arrived == other.arrived).all()
    assert study.mean_delta("delay", "ttft").high < 0
    assert study.difference("delay", "ttft", 50).high < 0
    assert study.mean("delay", "hit_rate") > study.mean("rr", "hit_rate")


class MyOwn(llmd.Router):
    def cost(self, request, view):
        return view.workers.running_requests


def test_a_policy_of_a_test_or_a_notebook_runs_in_processes():
    study = compare([MyOwn(), llmd.RoundRobin()], LOAD, workers=2, jobs=2)
    assert study.policies == ("MyOwn", "RoundRobin")
    assert "overload" not in repr(study).splitlines()[2] or study.overloaded("MyOwn")


def test_overload_is_labelled_and_its_misses_count():
    flood = workloads.documents(rate=60.0, requests=300)
    study = compare([llmd.LeastLoaded()], flood, workers=1)
    [policy] = study.policies
    assert study.overloaded(policy)
    assert "overload" in repr(study)
    [report] = study.reports[policy]
    assert not report.meets(study.slo)
    calm = compare([llmd.LeastLoaded()], flood.at_rate(0.5), workers=1)
    assert not calm.overloaded(policy)


def test_requests_refused_or_unfinished_are_misses():
    cluster = llmd.Cluster(balancer=llmd.Fcfs(max_running=1, max_waiting=2))
    report = simulate(cluster, workloads.batch(rate=50.0, requests=100), workers=1)
    slo = Slo(ttft_s=1e9)
    assert 0 < report.completed < 100
    assert report.good(slo).sum() == report.completed
    assert not report.meets(slo)


def test_capacity_is_where_the_slo_breaks():
    load = workloads.documents(requests=150, seed=4)
    slo = Slo(ttft_s=1.0)
    found = capacity(llmd.LeastWork(), load, slo, workers=2)
    assert simulate(llmd.LeastWork(), load.at_rate(found.rate), workers=2).meets(slo)
    above = load.at_rate(found.rate * 1.1)
    assert not simulate(llmd.LeastWork(), above, workers=2).meets(slo)
    [tried] = found.tried
    assert any(met for _, met in tried)
    assert not all(met for _, met in tried)


def test_twice_the_workers_serve_about_twice_the_rate():
    load = workloads.documents(requests=300, questions_per_document=1.0, seed=4)
    slo = Slo(ttft_s=2.0)
    one, two = (
        capacities([llmd.LeastWork()], load, slo, workers=count)["LeastWork"].rate
        for count in (2, 4)
    )
    assert 1.7 < two / one < 2.8


def test_two_policies_of_one_name_are_refused():
    with pytest.raises(InvalidRequest, match="one name"):
        compare([llmd.Random(), llmd.Random()], LOAD)


def test_an_interval_covers_its_figure_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(100):
        found = interval(mean, [rng.exponential(1.0, 400)])
        inside += found.low <= 1.0 <= found.high
    assert 85 <= inside <= 100
    assert math.isnan(percentile_of(90)(np.full(5, np.nan)))


def test_a_report_reads_as_table_json_html_and_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    report = simulate(llmd.LeastDelay(), LOAD, workers=3)
    document = json.loads(report.to_json(tmp_path / "r.json"))
    assert json.loads((tmp_path / "r.json").read_text()) == document
    assert len(document["requests"]["ttft_s"]) == 200
    assert document["summary"]["completed"] == 200
    assert "<table>" in report._repr_html_()
    assert report.policy == "LeastDelay"
    slo = Slo(ttft_s=2.0)
    for figure in (
        plots.latencies([report], slo),
        plots.load(report),
        plots.hit_rate(report),
        plots.gantt(report),
    ):
        figure.savefig(tmp_path / "x.png")
        assert (tmp_path / "x.png").stat().st_size > 2000


def test_the_gantt_covers_exactly_what_the_workers_did():
    report = simulate(llmd.LeastLoaded(), LOAD, workers=2)
    worker = report.workers[0]
    edges = np.linspace(worker.joined_at, worker.left_at, 50)
    covered = (plots._busy(worker.runs, edges) * np.diff(edges)).sum()
    assert covered == pytest.approx(worker.busy_s)


def test_percentiles_of_itl_weigh_tokens():
    report = simulate(llmd.LeastLoaded(), LOAD, workers=2)
    gaps = np.concatenate(
        [
            np.repeat((r[1] - r[0]) / r[2], int(r[2] * r[3]))
            for worker in report.workers
            for r in worker.runs
        ]
    )
    for percentile in (50, 90, 99):
        want = np.percentile(gaps, percentile, method="inverted_cdf")
        assert report.itl(percentile) == pytest.approx(want)


@pytest.mark.parametrize("requests", [1, 120])
def test_the_schema_of_llm_d_accepts_a_report(requests):
    schema = pytest.importorskip("llmd_benchmark_report")
    load = workloads.batch(rate=40.0, requests=requests)
    cluster = llmd.Cluster(balancer=llmd.Fcfs(max_running=2, max_waiting=20))
    report = simulate(cluster, load, workers=2)
    document = json.loads(json.dumps(benchmark_report(report)))
    read = schema.load_benchmark_report(document)
    aggregate = read.results.request_performance.aggregate
    assert aggregate.requests.total == requests
    assert aggregate.requests.failures == requests - report.completed
    assert aggregate.latency.time_to_first_token.p90 == report.ttft(90)
    assert benchmark_report(report)["run"]["uid"] == document["run"]["uid"]


SMALL = workloads.batch(rate=5.0, requests=60, answer_tokens=50, seed=1)
KEPT = Slo(ttft_s=1.0, tpot_s=0.05)


def test_bounds_of_a_search_are_tried_and_told():
    few = {"workers": 1, "policies": [llmd.LeastLoaded()]}
    few |= {"workload": SMALL, "slo": KEPT}
    [above] = capacities(between=(1e4, 2e4), **few | {"slo": Slo(e2e_s=0.3)}).values()
    assert above.rate == 0.0
    assert not above.open
    [below] = capacities(between=(0.1, 0.2), **few).values()
    assert below.rate == 0.2
    assert "at least" in repr(below)
    [zero] = capacities(
        between=(0.0, 1000.0), **few | {"slo": Slo(ttft_s=0.1)}
    ).values()
    [free] = capacities(**few | {"slo": Slo(ttft_s=0.1)}).values()
    assert zero.rate == pytest.approx(free.rate, rel=0.1)


def test_a_burst_that_saturates_nobody_is_called_one():
    load = workloads.batch(requests=20, answer_tokens=20)
    found = capacity(llmd.LeastLoaded(), load, Slo(ttft_s=5.0), workers=8)
    assert found.rate > 1e4
    assert not found.sustained
    assert "burst" in repr(found)


@pytest.mark.parametrize(
    "bad", [{"between": (5.0, 1.0)}, {"precision": 0.0}, {"between": (-1.0, 2.0)}]
)
def test_a_search_that_could_not_end_is_refused(bad):
    with pytest.raises(InvalidRequest, match="cannot search"):
        capacities([llmd.LeastLoaded()], SMALL, KEPT, **bad)


@pytest.mark.parametrize(
    "bad", [{"attainment": 90}, {"attainment": 0.0}, {"ttft_s": -1.0}]
)
def test_an_slo_that_cannot_be_meant_is_refused(bad):
    with pytest.raises(InvalidRequest):
        Slo(**bad)


def test_a_run_is_not_given_up_at_a_miss_that_the_slo_allows():
    load = workloads.batch(rate=0.1, requests=10, answer_tokens=5, seed=1)
    long = llmd.Request(id="long", prompt=range(50_000))
    jobs = [*load.jobs[:3], attrs.evolve(load.jobs[3], request=long), *load.jobs[4:]]
    load, slo = attrs.evolve(load, jobs=jobs), Slo(ttft_s=0.2)
    whole = simulate(llmd.LeastLoaded(), load, workers=1)
    hasty = simulate(llmd.LeastLoaded(), load, workers=1, give_up=slo)
    assert (whole.ttfts > 0.2).sum() == 1
    assert whole.meets(slo)
    assert hasty.meets(slo)
    assert hasty.completed == 10


def test_more_seeds_of_the_same_jobs_are_not_more_jobs():
    load = workloads.batch(rate=20.0, requests=300, seed=2).first(300)

    def width(seeds):
        study = compare([llmd.LeastLoaded()], load, seeds=seeds, workers=2)
        found = study.figure("LeastLoaded", "ttft")
        return found.high - found.low

    assert width(8) > 0.6 * width(1)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(InvalidRequest, match="in a list"):
        compare(llmd.RoundRobin(), SMALL)
    with pytest.raises(InvalidRequest, match="seeds"):
        compare([llmd.RoundRobin()], SMALL, seeds=0)
    with pytest.raises(InvalidRequest, match="itl"):
        compare([llmd.RoundRobin()], SMALL).figure("RoundRobin", "itl")
