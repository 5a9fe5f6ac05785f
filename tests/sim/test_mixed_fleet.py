"""Fleets whose machines differ: each worker takes the time of its own."""

import attrs
import numpy as np
import pytest

import llmd
from llmd.autoscaler import Cheapest, Offer, TargetConcurrency
from llmd.errors import InvalidRequest
from llmd.machines import H200, Machine
from llmd.sim import (
    EngineSettings,
    Simulator,
    Slo,
    capacity,
    compare,
    fleet,
    record,
    simulate,
    workloads,
)

FAST = Machine()
SLOW = attrs.evolve(
    FAST,
    prefill_floor_s=3 * FAST.prefill_floor_s,
    decode_floor_s=3 * FAST.decode_floor_s,
    prefill_s_per_token=3 * FAST.prefill_s_per_token,
)
LOAD = workloads.batch(rate=1.0, requests=40, seed=2)


def workers(*machines):
    made = fleet(len(machines))
    return [attrs.evolve(w, machine=m) for w, m in zip(made, machines, strict=True)]


def tpot_on(report, worker):
    there = np.array([id == worker.id for id in report.worker])
    return float(np.nanmean(report.tpots[there]))


def test_each_worker_takes_the_time_of_its_machine():
    report = simulate(
        llmd.RoundRobin(),
        LOAD,
        workers=workers("fast", "slow"),
        machines={"fast": FAST, "slow": SLOW},
    )
    fast, slow = report.workers
    assert tpot_on(report, slow) > 2 * tpot_on(report, fast)


def test_who_names_no_known_machine_has_the_default():
    there = workers("", "unheard of", "slow")
    mixed = simulate(
        llmd.RoundRobin(), LOAD, workers=there, machine=SLOW, machines={"slow": SLOW}
    )
    alike = simulate(llmd.RoundRobin(), LOAD, workers=there, machine=SLOW)
    assert np.array_equal(mixed.e2es, alike.e2es)


@pytest.mark.parametrize(
    ("machines", "what"), [({"Fast": FAST}, "'Fast'"), ({"fast": H200}, "'fast'")]
)
def test_machines_that_nobody_has_and_what_is_none_are_refused(machines, what):
    with pytest.raises(InvalidRequest, match=what):
        simulate(llmd.RoundRobin(), LOAD, workers=workers("fast"), machines=machines)


def test_a_machine_that_nobody_has_slows_no_link():
    there = [
        llmd.Worker(id="p", role=llmd.Role.PREFILL, machine="fast"),
        llmd.Worker(id="d", role=llmd.Role.DECODE, machine="fast"),
    ]
    snail = Machine(hardware=attrs.evolve(H200, network_bytes_per_s=1e6))

    def ttft(**machines):
        router = llmd.Disaggregated(min_uncached_tokens=1)
        return simulate(router, LOAD, workers=there, machines=machines).ttft(50)

    assert ttft(fast=FAST, unused=snail) == ttft(fast=FAST)
    assert ttft(fast=snail) > 10 * ttft(fast=FAST)


def test_more_workers_of_a_machine_are_of_that_machine():
    wish = TargetConcurrency(requests_per_worker=2, min_workers=3, max_workers=3)
    offers = (
        Offer(machine="fast", price=9.0, most=1),
        Offer(machine="slow", price=1.0),
    )
    report = simulate(
        llmd.Cluster(
            router=llmd.RoundRobin(), autoscaler=Cheapest(policy=wish, offers=offers)
        ),
        workloads.batch(rate=2.0, requests=200, seed=2),
        workers=workers("fast", "slow"),
        machines={"fast": FAST, "slow": SLOW},
        settings=EngineSettings(cold_start_s=1.0),
    )
    first, _, *more = report.workers
    assert more, "nobody came"
    assert all(tpot_on(report, one) > 2 * tpot_on(report, first) for one in more)


def test_a_router_that_knows_the_machines_sends_less_to_the_slow_one():
    machines = {"fast": FAST, "slow": SLOW}
    load = workloads.batch(rate=12.0, requests=200, seed=2)
    blind, knowing = compare(
        {"blind": llmd.LeastDelay(), "knowing": llmd.LeastDelay(machines=machines)},
        load,
        workers=workers("fast", "slow"),
        machines=machines,
    ).reports.values()

    def part_of_the_slow(report):
        return report.worker.count(report.workers[1].id) / report.completed

    assert part_of_the_slow(knowing[0]) < part_of_the_slow(blind[0])


def test_prompts_move_between_machines_that_differ():
    there = [
        llmd.Worker(id="p", role=llmd.Role.PREFILL, machine="slow"),
        llmd.Worker(id="d", role=llmd.Role.DECODE, machine="fast"),
    ]
    machines = {"fast": FAST, "slow": SLOW}
    slow = simulate(llmd.Disaggregated(), LOAD, workers=there, machines=machines)
    fast = simulate(llmd.Disaggregated(), LOAD, workers=there)
    assert slow.completed == fast.completed == len(LOAD)
    assert slow.ttft(50) > fast.ttft(50)
    assert np.nanmean(slow.tpots) == pytest.approx(np.nanmean(fast.tpots), rel=0.1)


def test_a_capacity_is_that_of_the_fleet_that_is():
    load = workloads.batch(requests=200, seed=2)

    def found(*machines):
        there, slo = workers(*machines), Slo(ttft_s=0.3)
        by_name = {"fast": FAST, "slow": SLOW}
        return capacity(
            llmd.LeastDelay(machines=by_name),
            load,
            slo,
            workers=there,
            machines=by_name,
            precision=0.1,
        ).rate

    assert found("slow", "slow") < found("fast", "slow") < found("fast", "fast")


def test_a_counterfactual_has_the_machines_of_the_fleet(tmp_path):
    path = tmp_path / "run.jsonl"
    with path.open("w") as file:
        recorder = record.Recorder(file)
        cluster = llmd.Cluster(router=llmd.RoundRobin(), observer=recorder)
        Simulator(cluster).run(LOAD, workers("slow", "slow"))

    def e2e(**machines):
        policies = {"same": llmd.RoundRobin()}
        (report,) = record.counterfactual(path, policies, **machines).reports["same"]
        return report.e2e(50)

    assert e2e(machines={"slow": SLOW}) > 1.5 * e2e()
