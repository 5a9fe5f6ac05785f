"""Comparisons and capacities: paired, honest about overload, and reproducible."""

import json
import math

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
    difference = study.difference("delay", "ttft")
    assert difference.high < 0
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
