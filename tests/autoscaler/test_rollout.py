"""Simulation in the loop finds the count that a search over whole runs finds."""

import attrs
import pytest

import llmd
from llmd.errors import NoSignal
from llmd.sim import Rollout, Slo, fleet, simulate, workloads
from llmd.sim.simulator import Simulator

SLO = Slo(ttft_s=2.0, tpot_s=0.2, attainment=0.95)
RATE = 8.0
# Slow, so that few requests make a load.
SLOW = attrs.evolve(
    llmd.Machine(),
    prefill_s_per_token=100e-6,
    prefill_floor_s=0.05,
    decode_floor_s=0.03,
)


def make_load(seconds):
    return workloads.batch(
        rate=RATE,
        requests=int(RATE * seconds),
        prompt_tokens=1500.0,
        answer_tokens=10.0,
        burstiness=1.0,
    )


def enough(workers):
    report = simulate(llmd.LeastLoaded(), make_load(60), workers=workers, machine=SLOW)
    return report.good(SLO).mean() >= SLO.attainment


@pytest.mark.parametrize("start", [1, 6])
def test_it_finds_what_a_search_finds(start):
    best = next(count for count in range(1, 8) if enough(count))
    policy = Rollout(slo=SLO, machine=SLOW, max_workers=8, patience=20.0, horizon=30.0)
    cluster = llmd.Cluster(router=llmd.LeastLoaded(), autoscaler=policy)
    advice = []
    cluster.observer = lambda item: (
        advice.append(policy.advice) if isinstance(item, llmd.events.Tick) else None
    )
    template = fleet(1)[0]
    simulator = Simulator(
        cluster,
        machine=SLOW,
        settings=llmd.sim.EngineSettings(cold_start_s=5.0),
        spawn=lambda row, pool: attrs.evolve(template, id=f"new-{row}"),
    )
    simulator.run(make_load(90), fleet(start), until=80.0)
    late = [one.workers for one in advice if one is not None and one.at > 60]
    assert abs(late[-1] - best) <= 1
    assert "requests tried" in advice[-1].explain()


def test_it_cannot_tell_before_an_answer_has_ended(make_bench):
    bench, policy = make_bench(2), Rollout(slo=SLO, max_workers=4)
    with pytest.raises(NoSignal, match="watched"):
        policy.wanted(bench.view)
    bench.arrive(3)
    bench.wait(5.0)
    with pytest.raises(NoSignal, match="no answer has ended"):
        policy.wanted(bench.view)
    assert policy.target(bench.view) == 2


def test_an_idle_fleet_needs_nobody(make_bench):
    bench = make_bench(2)
    policy = Rollout(slo=SLO, min_workers=0, max_workers=4, patience=1.0)
    counts = []
    for _ in range(4):
        counts.append(policy.target(bench.view))
        bench.wait(1.0)
    assert counts[-1] == 0
