"""Figures and recordings that say what happened, where it is easy to say otherwise."""

import math
import warnings

import attrs
import numpy as np
import pytest

import llmd
from llmd import Request, Role, State, Worker
from llmd import events as e
from llmd.balancer import FixedRoom, FlowControl
from llmd.errors import InvalidRequest, PolicyError
from llmd.router import Disaggregated
from llmd.sim import (
    Crash,
    EngineSettings,
    Job,
    Rollout,
    Simulator,
    Slo,
    Workload,
    capacities,
    compare,
    fleet,
    plots,
    simulate,
    workloads,
)
from llmd.sim.record import Recorder, counterfactual, extract, recording

PREFILL_AND_DECODE = [
    *[Worker(id=f"p{row}", role=Role.PREFILL) for row in range(2)],
    *[Worker(id=f"d{row}", role=Role.DECODE) for row in range(2)],
]


def disaggregated():
    return Disaggregated(
        prefill=llmd.LeastLoaded(), decode=llmd.LeastLoaded(), min_uncached_tokens=16
    )


def one(id, prompt, answer, at=0.0, **request):
    made = Request(id=id, prompt=range(prompt), **request)
    return Job(request=made, output_tokens=answer, at=at)


def of(*jobs):
    return Workload(name="made", jobs=jobs)


# Hits.


def test_kv_that_was_handed_over_is_no_hit():
    load = workloads.batch(rate=3, requests=60)
    report = simulate(disaggregated(), load, workers=PREFILL_AND_DECODE)
    assert report.completed == 60
    assert report.hit_rate == 0.0
    load = workloads.shared_prefix(rate=3, requests=60, groups=3, answer_tokens=20)
    report = simulate(disaggregated(), load, workers=PREFILL_AND_DECODE)
    computed = sum(worker.prompt_tokens for worker in report.workers)
    asked = int(report.prompt_tokens.sum())
    # The last token of a prompt is computed at both ends.
    assert computed - 60 <= asked - int(report.cached_tokens.sum()) <= computed


def test_a_prompt_that_is_computed_anew_after_a_crash_is_no_hit():
    load = workloads.batch(rate=8, requests=60, answer_tokens=300.0)
    crashes = [Crash(at=2.0, worker="p0"), Crash(at=3.0, worker="d0")]
    report = simulate(
        disaggregated(), load, workers=PREFILL_AND_DECODE, crashes=crashes
    )
    assert report.hit_rate == 0.0


# Deadlines.


def test_deadlines_are_kept_to_the_instant():
    report = simulate(llmd.RoundRobin(), of(one("a", 100, 100, deadline=0.1)))
    assert report.status == ("DeadlineExceeded: 'a' ran past its deadline",)
    assert report.ended[0] == 0.1
    jobs = [
        attrs.evolve(job, request=attrs.evolve(job.request, deadline=job.at + 1.0))
        for job in workloads.batch(rate=20, requests=200, answer_tokens=150).jobs
    ]
    report = simulate(llmd.LeastLoaded(), of(*jobs), workers=2)
    assert 0 < report.completed < 200
    late = report.ended - report.arrived
    assert late.max() == pytest.approx(1.0)


def test_a_deadline_far_off_keeps_no_run_going():
    never = Worker(id="p", role=Role.PREFILL)
    cluster = llmd.Cluster(
        router=llmd.LeastLoaded(),
        autoscaler=llmd.TargetConcurrency(requests_per_worker=9, max_workers=1),
    )
    load = of(one("a", 100, 10, deadline=1e9))
    report = simulate(cluster, load, workers=[never])
    assert report.ended[0] == 1e9
    assert report.status[0].startswith("DeadlineExceeded")


# Who cannot be served, and workers that are not there.


def test_requests_that_nobody_takes_say_so():
    for role in Role.PREFILL, Role.DECODE:
        workers = [Worker(id="w", role=role)]
        report = simulate(llmd.LeastLoaded(), of(one("a", 9, 9)), workers=workers)
        assert report.status == ("never sent to a worker",)
        assert np.isnan(report.ended).all()


@pytest.mark.parametrize("state", [State.SLEEPING, State.DRAINING])
def test_workers_that_nothing_would_wake_are_refused(state):
    asleep = [Worker(id="x", state=state), Worker(id="y")]
    with pytest.raises(InvalidRequest, match=state.value):
        simulate(llmd.RoundRobin(), of(one("a", 9, 9)), workers=asleep)


def test_a_worker_that_starts_is_ready_after_a_cold_start():
    settings = EngineSettings(cold_start_s=7.0)
    starting = [Worker(id="x", state=State.STARTING)]
    load = of(one("a", 9, 9))
    report = simulate(llmd.RoundRobin(), load, workers=starting, settings=settings)
    assert report.dispatched[0] == 7.0
    assert report.completed == 1


def test_workers_may_be_any_that_can_be_looked_through():
    load = workloads.batch(requests=20)
    assert simulate(llmd.RoundRobin(), load, workers=iter(fleet(2))).completed == 20
    assert simulate(llmd.RoundRobin(), load, workers=np.int64(2)).completed == 20
    policies = [llmd.RoundRobin(), llmd.LeastLoaded()]
    study = compare(policies, load, workers=(w for w in fleet(2)))
    assert all(reports[0].completed == 20 for reports in study.reports.values())


@pytest.mark.parametrize("odd", [0, -1, 2.0, "2", True, None, [], [None]])
def test_workers_that_are_none_are_refused(odd):
    with pytest.raises(InvalidRequest, match="workers"):
        simulate(llmd.RoundRobin(), workloads.batch(requests=2), workers=odd)


def test_a_crash_is_of_somebody_and_of_who_took_its_place():
    load = workloads.batch(rate=10, requests=100)
    with pytest.raises(InvalidRequest, match="w000"):
        simulate(
            llmd.LeastLoaded(), load, workers=2, crashes=[Crash(at=1.0, worker="w0")]
        )
    twice = [Crash(at=at, worker="w000", restart_after_s=0.5) for at in (1.0, 3.0)]
    report = simulate(llmd.LeastLoaded(), load, workers=2, crashes=twice)
    there = [load.id for load in report.workers]
    assert there == ["w000", "w001", "w000-at-1", "w000-at-3"]


# Recordings.


def recorded(path, load, workers=2, **kwargs):
    cluster = llmd.Cluster(router=llmd.LeastLoaded())
    with path.open("w") as file:
        cluster.observer = Recorder(file)
        return Simulator(cluster, **kwargs).run(load, fleet(workers))


def test_an_answer_that_went_on_elsewhere_is_recorded_whole(tmp_path):
    jobs = [
        Job(
            request=Request(id=f"a{row}", prompt=[row, *range(999)], resumable=True),
            output_tokens=200,
            at=0.01 * row,
        )
        for row in range(4)
    ]
    crashes = (Crash(at=0.6, worker="w000"),)
    settings = EngineSettings(report_tokens=8)
    path = tmp_path / "run.jsonl"
    report = recorded(path, of(*jobs), crashes=crashes, settings=settings)
    assert report.completed == 4
    found = extract(path).workload
    assert [job.output_tokens for job in found.jobs] == [200] * 4


def test_an_id_that_was_used_again_is_another_request(tmp_path):
    path = tmp_path / "run.jsonl"
    with path.open("w") as file:
        cluster = llmd.Cluster(observer=Recorder(file))
        cluster.handle(e.WorkerJoined(0.0, Worker(id="w")))
        for at in 1.0, 2.0, 3.0:
            request = Request(id="r", prompt=[1, 2, 3])
            cluster.handle(e.RequestArrived(at, request))
            cluster.handle(e.FirstToken(at, "w", "r"))
            cluster.handle(e.TokensGenerated(at, "w", "r", int(at)))
            cluster.handle(e.RequestEnded(at, "w", "r"))
    found = extract(path).workload
    assert [(job.id, job.output_tokens) for job in found.jobs] == [
        ("r", 2),
        ("r~2", 3),
        ("r~3", 4),
    ]


def test_dialogues_of_a_recording_are_dialogues(tmp_path):
    load = workloads.dialogue(requests=300, rate=6, seed=1)
    path = tmp_path / "run.jsonl"
    report = recorded(path, load)
    again = extract(path).workload
    assert {job.id: job.follows for job in again} == {
        job.id: job.follows for job in load
    }
    study = counterfactual(path, [llmd.LeastLoaded()])
    (same,) = study.reports[study.policies[0]]
    assert same.hit_rate == pytest.approx(report.hit_rate, abs=0.002)
    assert same.ttft(90) == pytest.approx(report.ttft(90), rel=0.02)


def test_a_recording_may_begin_when_workers_are_there(tmp_path):
    seen = []
    cluster = llmd.Cluster(router=llmd.LeastLoaded(), observer=seen.append)
    for name in "ab":
        cluster.handle(e.WorkerJoined(0.0, Worker(id=name)))
    path = tmp_path / "run.jsonl"
    with recording(cluster, path):
        for at in 1.0, 2.0:
            request = Request(id=f"r{at:g}", prompt=[1, 2, 3])
            (sent,) = cluster.handle(e.RequestArrived(at, request))
            cluster.handle(e.RequestEnded(at + 0.5, sent.decision.decode, request.id))
    told = len(seen)
    cluster.handle(e.Tick(3.0))
    assert len(seen) == told + 1, "who looked before looks on"
    study = counterfactual(path, [llmd.RoundRobin(), llmd.LeastLoaded()])
    assert all(reports[0].completed == 2 for reports in study.reports.values())


def test_who_left_leaves_again_and_is_not_answered(tmp_path):
    path = tmp_path / "run.jsonl"
    jobs = [one("stays", 100, 300), one("leaves", 100, 400)]
    jobs[1] = attrs.evolve(jobs[1], cancel_after_s=0.1)
    report = recorded(path, of(*jobs))
    assert report.status == ("completed", "cancelled")
    study = counterfactual(path, [llmd.LeastLoaded()])
    (same,) = study.reports[study.policies[0]]
    assert same.status == report.status


def test_a_recording_that_is_none_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(InvalidRequest, match="no text"):
        extract(path)
    recorded(path, of(one("a", 9, 9)))
    path.write_text(path.read_text() + '{"event": 5}\n')
    with pytest.raises(InvalidRequest, match="no event"):
        extract(path)


# Parameters.


@pytest.mark.parametrize("requests", [3, 4, 17, 19, 21, 101, 103])
def test_a_mixture_is_as_large_as_was_asked_for(requests):
    assert len(workloads.mixed(requests=requests)) == requests


@pytest.mark.parametrize("name", ["batch", "dialogue", "documents", "shared_prefix"])
def test_numbers_of_numpy_are_numbers(name):
    make = getattr(workloads, name)
    given, plain = np.int64(5), 5
    one, other = make(requests=given, seed=given), make(requests=plain, seed=plain)
    assert [job.request.prompt.segments for job in one] == [
        job.request.prompt.segments for job in other
    ]
    assert one.seeded(np.int64(3)).jobs[0].at == other.seeded(3).jobs[0].at


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.uint16, np.int64])
def test_lengths_of_numpy_are_lengths(kind):
    job = Job(request=Request(id="a", prompt=range(50)), output_tokens=kind(100))
    assert type(job.output_tokens) is int
    assert simulate(llmd.RoundRobin(), of(job), workers=1).output_tokens[0] == 100


@pytest.mark.parametrize("odd", [0, 2.5, 5.0, math.nan, "5", None, True, 1 << 50])
def test_answers_of_no_length_are_refused(odd):
    with pytest.raises(InvalidRequest, match="output_tokens"):
        Job(request=Request(id="a", prompt=[1]), output_tokens=odd)


def test_an_answer_longer_than_its_request_wants_is_refused():
    with pytest.raises(InvalidRequest, match="8 at most"):
        one("a", 100, 50, max_new_tokens=8)


@pytest.mark.parametrize("odd", [1e-17, 1e-9, -1.0, math.nan, math.inf])
def test_looks_without_end_are_refused(odd):
    load = workloads.batch(requests=5)
    with pytest.raises(InvalidRequest, match="signals_s"):
        simulate(llmd.RoundRobin(), load, workers=1, signals_s=odd)


LOAD = workloads.batch(requests=10)


@pytest.mark.parametrize(
    "call",
    [
        lambda: LOAD.seeded(None),
        lambda: LOAD.jittered(-1),
        lambda: LOAD.jittered(math.nan),
        lambda: LOAD.at_rate("2"),
        lambda: workloads.batch(rate="x"),
        lambda: workloads.batch(answer_tokens=math.nan),
        lambda: workloads.shared_prefix(answer_tokens=math.nan),
        lambda: workloads.dialogue(requests=10.5),
        lambda: one("a", 9, 9, at=1e17),
        lambda: Worker(id="a", kv_blocks=2.5),
        lambda: fleet(2, block_tokens=0),
        lambda: EngineSettings(step_tokens=2.5),
        lambda: compare([llmd.RoundRobin()], LOAD, seeds=2.5),
        lambda: compare([llmd.RoundRobin()], LOAD, jobs="2"),
        lambda: compare([llmd.RoundRobin()], LOAD, jobs=0),
        lambda: compare([llmd.RoundRobin()], LOAD, jobs=2.0),
        lambda: compare([llmd.RoundRobin()], LOAD, seeds=2.0),
        lambda: compare([llmd.RoundRobin()], LOAD, slo=3),
        lambda: workloads.batch(requests=10.0),
        lambda: fleet(2, block_tokens=16.0),
        lambda: fleet(2.5),
        lambda: compare({1: llmd.RoundRobin()}, LOAD),
        lambda: compare([llmd.RoundRobin()], LOAD).goodput("typo"),
        lambda: compare([llmd.RoundRobin()], LOAD).mean("RoundRobin", "typo"),
        lambda: capacities([llmd.RoundRobin()], LOAD, None),
        lambda: simulate(llmd.RoundRobin(), LOAD).itl(101),
        lambda: simulate(llmd.RoundRobin(), LOAD).ttft(-1),
        lambda: plots.latencies(simulate(llmd.RoundRobin(), LOAD), name="itl"),
    ],
)
def test_what_makes_no_sense_is_refused(call):
    with pytest.raises(InvalidRequest):
        call()


def test_times_may_come_in_a_list():
    moved = LOAD.arriving([*range(10)])
    assert [job.at for job in moved] == [*range(10)]


def test_a_policy_that_cannot_be_copied_is_named():
    class Locked(llmd.Router):
        def __init__(self):
            self.file = open(__file__)  # noqa: SIM115

        def cost(self, request, view):
            return view.workers.running_requests

    policy = Locked()
    try:
        with pytest.raises(PolicyError, match=r"Locked.*cannot be copied"):
            simulate(policy, LOAD)
    finally:
        policy.file.close()


def test_one_request_makes_an_interval_without_ends():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = compare([llmd.RoundRobin()], of(one("a", 9, 9)))
        assert study.figure("RoundRobin", "ttft").high == math.inf
        assert "RoundRobin" in repr(study)


def test_a_table_says_whose_each_request_was():
    table = simulate(llmd.RoundRobin(), LOAD).table()
    assert table["tenant"] == ["batch"] * 10
    assert list(table["priority"]) == [1] * 10


def test_an_slo_of_nobody_is_kept():
    assert simulate(llmd.RoundRobin(), of()).meets(Slo(ttft_s=1.0))


# What a review of all this found.


def test_a_deadline_that_was_over_on_arrival_is_told_at_once():
    cluster = llmd.Cluster(
        router=llmd.LeastLoaded(), balancer=FlowControl(rooms=[FixedRoom(1)])
    )
    jobs = [
        one("a", 3000, 300),
        one("b", 9, 9, at=0.1),
        one("c", 9, 9, at=1.0, deadline=0.5),
        one("d", 9, 9, at=1.0, deadline=1.0),
    ]
    report = simulate(cluster, of(*jobs), workers=1)
    assert list(report.ended[2:]) == [1.0, 1.0]
    assert all("Deadline" in status for status in report.status[2:])


def test_answers_are_counted_up_to_their_deadline():
    jobs = [one("a", 100, 500, deadline=0.3)]
    jobs.append(attrs.evolve(one("b", 100, 500), cancel_after_s=0.3))
    report = simulate(llmd.RoundRobin(), of(*jobs), workers=2)
    assert report.output_tokens[0] == report.output_tokens[1] > 10


def test_a_prompt_that_was_lost_with_its_target_is_no_hit():
    workers = [
        Worker(id="p0", role=Role.PREFILL),
        Worker(id="d0", role=Role.DECODE),
        Worker(id="d1", role=Role.DECODE),
    ]
    load = of(one("a", 20_000, 50))
    whole = simulate(disaggregated(), load, workers=workers)
    for part in 0.5, 0.99:
        crash = Crash(at=part * whole.ttft(50), worker=whole.worker[0])
        report = simulate(disaggregated(), load, workers=workers, crashes=[crash])
        assert report.completed == 1
        assert report.cached_tokens[0] == 0


def test_an_autoscaler_that_tries_things_out_knows_of_short_answers():
    cluster = llmd.Cluster(
        router=llmd.LeastLoaded(),
        balancer=FlowControl(rooms=[FixedRoom(4)]),
        autoscaler=Rollout(
            slo=Slo(ttft_s=1.0), interval=5.0, horizon=5.0, window=10.0, max_workers=3
        ),
    )
    jobs = [
        one(f"batch{row}", 100, 5, at=0.1 * row, max_new_tokens=8)
        if row % 3 == 0
        else one(f"batch{row}", 100, 200, at=0.1 * row)
        for row in range(150)
    ]
    assert simulate(cluster, of(*jobs), workers=1).completed == 150


@pytest.mark.parametrize("begin", [0.0, 1e6])
def test_every_successor_has_an_id_of_its_own(begin):
    jobs = [one(f"r{row}", 50, 300, at=begin + 0.1 * row) for row in range(80)]
    crashes = [
        Crash(at=begin + at, worker=worker, restart_after_s=0.3)
        for at in (1.0, 2.0, 3.0)
        for worker in ("gpu-at-rack1", "gpu-at-rack2")
    ]
    workers = [Worker(id=name) for name in ("gpu-at-rack1", "gpu-at-rack2", "x")]
    report = simulate(llmd.LeastLoaded(), of(*jobs), workers=workers, crashes=crashes)
    ids = [worker.id for worker in report.workers]
    assert len(set(ids)) == len(ids) == 3 + len(crashes)


def test_a_run_that_is_cut_says_nothing_of_who_waits():
    cluster = llmd.Cluster(balancer=FlowControl(rooms=[FixedRoom(1)]))
    simulator = Simulator(cluster)
    load = workloads.batch(rate=20, requests=60)
    report = simulator.run(load, fleet(1), until=2.0)
    assert set(report.status) <= {"", "completed"}


def told(path, *turns, stored=(), sizes=(16,)):
    """Record turns of a session, (id, prompt, answer tokens), one after the other."""
    cluster = llmd.Cluster(router=llmd.LeastLoaded())
    with recording(cluster, path):
        cluster.handle(e.WorkerJoined(0.0, Worker(id="w", block_tokens=sizes[0])))
        for number, (id, prompt, tokens) in enumerate(turns, start=1):
            if number == 2:
                for size in sizes[1:]:
                    other = Worker(id=f"w{size}", block_tokens=size)
                    cluster.handle(e.WorkerJoined(number, other))
            request = Request(id=id, prompt=prompt, session="s")
            (sent,) = cluster.handle(e.RequestArrived(number, request))
            worker = sent.decision.decode
            cluster.handle(e.FirstToken(number, worker, id, 0))
            cluster.handle(e.TokensGenerated(number, worker, id, tokens - 1))
            cluster.handle(e.RequestEnded(number + 0.5, worker, id))
            for tokens_held in stored:
                names = Request(id="x", prompt=tokens_held).hashes(16)
                held = e.BlocksStored(number + 0.5, worker, names, 16)
                cluster.handle(held)
    return extract(path).workload


def test_a_turn_follows_whom_it_has_in_front(tmp_path):
    path = tmp_path / "run.jsonl"
    first, whole = [*range(40)], [*range(140)]
    turns = ("a", first, 60), ("b", whole, 10)
    a, b = told(path, *turns, stored=[whole[:100]])
    assert (b.follows, b.think_s, a.answer.tokens) == ("a", 0.5, 100)
    # Sizes that were not known when the first one came tell nothing of it.
    a, b = told(path, *turns, stored=[whole[:100]], sizes=(16, 32))
    assert b.follows == "a"
    # Nobody ever held what it has where the answer would be.
    a, b = told(path, *turns, stored=[first])
    assert (b.follows, a.answer) == ("", None)
    # Too short to tell, or of something else.
    a, b = told(path, ("a", [*range(10)], 400), ("b", [*range(5000, 6000)], 1))
    assert (b.follows, a.answer) == ("", None)


def test_who_missed_a_deadline_misses_it_again(tmp_path):
    path = tmp_path / "run.jsonl"
    jobs = [one(f"r{n}", 2000, 900, at=0.1 * n, deadline=0.1 * n + 2) for n in range(5)]
    jobs.append(one("long", 2000, 900))
    report = recorded(path, of(*jobs), workers=1)
    assert sum("Deadline" in status for status in report.status) == 5
    study = counterfactual(path, [llmd.LeastLoaded()])
    (same,) = study.reports[study.policies[0]]
    assert same.status == report.status


def test_who_left_after_the_end_did_not_leave(tmp_path):
    path = tmp_path / "run.jsonl"
    cluster = llmd.Cluster(router=llmd.LeastLoaded())
    with recording(cluster, path):
        cluster.handle(e.WorkerJoined(0.0, Worker(id="w")))
        cluster.handle(e.RequestArrived(1.0, Request(id="r", prompt=[1, 2])))
        cluster.handle(e.FirstToken(1.1, "w", "r"))
        cluster.handle(e.RequestEnded(1.1, "w", "r"))
        cluster.handle(e.RequestCancelled(1.2, "r"))
    (job,) = extract(path).workload.jobs
    assert (job.output_tokens, job.cancel_after_s) == (1, math.inf)


def test_an_empty_recording_is_none(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("")
    with pytest.raises(InvalidRequest, match="no recording of version"):
        extract(path)
