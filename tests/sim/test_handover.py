"""Prompts handed from worker to worker, when something comes between."""

import math

import attrs
import pytest

import llmd
from llmd import Cluster, Disaggregated, Request, Role, Worker
from llmd.autoscaler import Autoscaler
from llmd.machines import H200, Machine
from llmd.sim import Crash, EngineSettings, Job, Simulator, Workload, simulate

# A transfer of 8,000 tokens takes more than a second.
SLOW = Machine(hardware=attrs.evolve(H200, network_bytes_per_s=0.4e9))


def job(id, tokens=8000, output=5, start=0, **more):
    request = Request(id=id, prompt=range(start, start + tokens))
    return Job(request=request, output_tokens=output, **more)


def load(*jobs):
    return Workload(name="few", jobs=jobs)


def prefill(id, **more):
    return Worker(id=id, role=Role.PREFILL, **more)


def decode(id, **more):
    return Worker(id=id, role=Role.DECODE, **more)


def fleet(*, crashes=(), autoscaler=None, tick_s=1.0, **more):
    router = Disaggregated(min_uncached_tokens=16)
    cluster = Cluster(router=router, autoscaler=autoscaler, **more)
    return Simulator(cluster, machine=SLOW, crashes=crashes, tick_s=tick_s)


def test_what_is_given_up_leaves_its_part_of_the_link_to_others():
    def end(*others):
        jobs = load(job("a"), *others)
        report = fleet().run(jobs, [prefill("p0"), prefill("p1"), decode("d")])
        return dict(zip(report.ids, report.ended, strict=True))["a"]

    alone, shared = end(), end(job("b", start=9000))
    given_up = end(job("b", start=9000, cancel_after_s=1.0))
    assert alone < given_up < shared


def test_the_clock_goes_on_after_a_transfer_was_given_up():
    jobs = load(
        job("a"),
        job("b", start=9000, cancel_after_s=1.6),
        job("c", tokens=1000, start=20_000, at=2.3),
    )
    workers = [prefill("p0"), prefill("p1"), prefill("p2"), decode("d")]
    report = fleet().run(jobs, workers)
    assert report.status == ("completed", "cancelled", "completed")


def test_a_prompt_that_nobody_wants_any_more_is_not_kept():
    simulator = fleet()
    jobs = load(job("a", cancel_after_s=0.5), job("b", start=9000, at=2.0))
    # There is room for one prompt at a time.
    report = simulator.run(jobs, [prefill("p", kv_blocks=600), decode("d")])
    assert report.status == ("cancelled", "completed")
    model = simulator.engines["p"].model
    assert not model.held
    assert model.kv.cache.used_blocks == 0


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9, 1.3, 1.34])
def test_a_lost_decode_worker_is_given_the_prompt_again_when_it_is_back(at):
    crash = Crash(at=at, worker="d", restart_after_s=0.01)
    simulator = fleet(crashes=(crash,))
    report = simulator.run(load(job("a")), [prefill("p"), decode("d")])
    assert report.status == ("completed",)
    assert report.e2es[0] > at + 1.0
    assert simulator.engines["p"].model.kv.cache.used_blocks == 0


@attrs.define
class Fewer(Autoscaler):
    """Wants one worker less after a while."""

    workers: int = 3
    after: float = 0.15

    def wanted(self, view):
        return self.workers - (view.now >= self.after)


def test_who_is_promised_a_prompt_stays_until_it_has_answered():
    scaler = Fewer(min_workers=1, max_workers=3, patience=0.0)
    simulator = fleet(autoscaler=scaler, tick_s=0.1, max_attempts=1)
    report = simulator.run(load(job("a")), [prefill("p"), decode("d"), decode("e")])
    assert report.status == ("completed",)
    left = {id: engine.left_at for id, engine in simulator.engines.items()}
    assert left[report.worker[0]] == math.inf or left[report.worker[0]] >= 1.0


def test_a_draining_worker_leaves_when_its_last_request_gives_up_on_the_way():
    scaler = Fewer(workers=2, min_workers=1, max_workers=2, patience=0.0)
    simulator = Simulator(
        Cluster(router=llmd.RoundRobin(), autoscaler=scaler),
        settings=EngineSettings(intake_s=0.5),
        tick_s=0.1,
    )
    jobs = load(job("a"), job("b", cancel_after_s=0.4), job("c", at=100.0))
    simulator.run(jobs, [Worker(id="x"), Worker(id="y")])
    assert simulator.engines["y"].left_at == pytest.approx(0.4)


@pytest.mark.parametrize("deadline", [5.0, math.inf])
def test_a_run_ends_though_nobody_is_left_to_answer(deadline):
    lone = job("a", at=1.0)
    lone = attrs.evolve(lone, request=attrs.evolve(lone.request, deadline=deadline))
    report = simulate(
        llmd.RoundRobin(),
        load(lone),
        workers=[Worker(id="w")],
        crashes=[Crash(at=0.1, worker="w")],
        signals_s=1.0,
    )
    assert report.status[0].startswith("DeadlineExceeded" if deadline == 5.0 else "")
    assert report.completed == 0


def test_a_run_ends_though_signals_and_ticks_go_on():
    scaler = Fewer(workers=1, after=math.inf, min_workers=1, max_workers=1)
    simulator = Simulator(
        Cluster(router=llmd.RoundRobin(), autoscaler=scaler),
        crashes=(Crash(at=0.1, worker="w"),),
        spawn=lambda number, pool: Worker(id=f"spawned{number}", models={"other"}),
        signals_s=1.0,
    )
    report = simulator.run(load(job("a", at=1.0)), [Worker(id="w")])
    assert report.completed == 0


def test_a_prompt_that_its_target_refuses_leaves_nothing_behind():
    workers = [
        decode("small", kv_blocks=12),
        decode("large", kv_blocks=250),
        prefill("p", kv_blocks=60),
    ]
    jobs = [job(f"r{k}", tokens=300, start=10_000 * k, at=float(k)) for k in range(8)]
    router = Disaggregated(min_uncached_tokens=1, decode=llmd.RoundRobin())
    simulator = Simulator(Cluster(router=router))
    report = simulator.run(load(*jobs), workers)
    assert all(report.status), report.status
    for engine in simulator.engines.values():
        engine.model.kv.cache.check()
        assert engine.model.kv.cache.used_blocks == 0


def test_a_prompt_that_no_worker_can_answer_is_refused():
    workers = [decode("d", kv_blocks=12), prefill("p", kv_blocks=250)]
    router = Disaggregated(min_uncached_tokens=1)
    report = simulate(router, load(job("one", tokens=300)), workers=workers)
    assert "larger than the KV cache" in report.status[0]
