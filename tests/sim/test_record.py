"""Recordings: exact, complete, silent about contents, and good for what-if."""

import io
import json

import attrs
import numpy as np
import pytest

import llmd
from llmd import events as e
from llmd.errors import InvalidRequest
from llmd.sim import Crash, Simulator, fleet, workloads
from llmd.sim.codec import decode, encode
from llmd.sim.record import Recorder, counterfactual, extract, read, replay

ROUTERS = [llmd.PowerOfTwo(), llmd.LeastDelay(), llmd.RoundRobin()]


def record(path, router, load, **kwargs):
    cluster = llmd.Cluster(
        router=router,
        balancer=llmd.Fcfs(max_running=8),
        autoscaler=llmd.TargetConcurrency(requests_per_worker=6, max_workers=4),
        seed=7,
    )
    with path.open("w") as file:
        cluster.observer = Recorder(file)
        simulator = Simulator(
            cluster, spawn=lambda row, pool: llmd.Worker(id=f"n{row}"), **kwargs
        )
        return simulator.run(load, fleet(2))


def fresh(router):
    return llmd.Cluster(
        router=router,
        balancer=llmd.Fcfs(max_running=8),
        autoscaler=llmd.TargetConcurrency(requests_per_worker=6, max_workers=4),
        seed=7,
    )


@pytest.fixture
def load():
    made = workloads.dialogue(rate=10.0, requests=120, think_s=1.0, seed=2)
    jobs = []
    for row, job in enumerate(made.jobs):
        request = attrs.evolve(
            job.request,
            salt="x" if row % 3 else "",
            media=((20, "a picture"),) if row % 7 == 0 else (),
            deadline=40.0 if row % 5 else float("inf"),
        )
        patience = 0.3 if row % 11 == 0 else float("inf")
        jobs.append(attrs.evolve(job, request=request, cancel_after_s=patience))
    return attrs.evolve(made, jobs=jobs)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: type(router).__name__)
def test_a_replay_is_equal_to_the_last_bit(tmp_path, load, router):
    path = tmp_path / "run.jsonl"
    crash = Crash(at=4.0, worker="w000")
    record(path, router, load, crashes=(crash,), signals_s=0.5)
    assert replay(path, fresh(router)) is None
    kinds = {type(event) for _, event, _ in read(path)}
    assert {e.WorkerLeft, e.RequestCancelled, e.SignalsReported, e.Tick} <= kinds


def test_another_policy_differs_and_says_where(tmp_path, load):
    path = tmp_path / "run.jsonl"
    record(path, llmd.RoundRobin(), load)
    difference = replay(path, fresh(llmd.LeastWork()))
    assert difference is not None
    assert difference.recorded != difference.replayed
    assert isinstance(
        difference.event, e.RequestArrived | e.RequestEnded | e.FirstToken
    )


def test_the_workload_of_a_recording_is_what_was_played(tmp_path, load):
    path = tmp_path / "run.jsonl"
    report = record(path, llmd.LeastLoaded(), load)
    recording = extract(path)
    rows = {id: row for row, id in enumerate(report.ids)}
    assert len(recording.workload) == int((~np.isnan(report.arrived)).sum())
    for job in recording.workload.jobs:
        row = rows[job.id]
        assert job.at == report.arrived[row]
        if report.done[row]:
            assert job.output_tokens == report.output_tokens[row]
    assert [worker.id for worker in recording.workers] == ["w000", "w001"]


def test_a_counterfactual_gives_a_difference_for_each_request(tmp_path):
    load = workloads.shared_prefix(rate=8.0, requests=150, groups=12, answer_tokens=50)
    path = tmp_path / "run.jsonl"
    record(path, llmd.RoundRobin(), load)
    study = counterfactual(path, [llmd.RoundRobin(), llmd.LeastDelay()])
    deltas = study.deltas(study.policies[1], "ttft")
    assert deltas.shape == (150,)
    mean = study.mean_delta(study.policies[1], "ttft")
    assert mean.low <= mean.value <= mean.high < 0
    assert mean.value == pytest.approx(deltas.mean())


def test_no_token_is_recorded():
    file = io.StringIO()
    cluster = llmd.Cluster(observer=Recorder(file))
    cluster.handle(e.WorkerJoined(0.0, llmd.Worker(id="a")))
    secret = [987_654_321] * 40
    cluster.handle(e.RequestArrived(0.0, llmd.Request(id="r", prompt=secret)))
    assert "987654321" not in file.getvalue()
    event = json.loads(file.getvalue().splitlines()[2])["event"]
    request = decode(event).request
    assert request.prompt_tokens == 40
    assert len(request.hashes(16)) == 2


@pytest.mark.parametrize(
    "value",
    [
        e.WorkerJoined(
            0.1 + 0.2, llmd.Worker(id="a", models=["m"], role=llmd.Role.DECODE)
        ),
        e.WorkerChanged(1.0, "a", state=llmd.State.DRAINING, models=frozenset("xy")),
        e.SignalsReported(1e-300, "a", llmd.Signals(kv_usage=0.1)),
        e.RequestEnded(5e-324, "a", "r", error="lost"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_events_survive_exactly(value):
    again = decode(json.loads(json.dumps(encode(value))))
    assert repr(again) == repr(value)
    assert type(again) is type(value)


def test_what_is_no_recording_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"llmd_recording": 99}\n')
    with pytest.raises(InvalidRequest, match="version"):
        list(read(path))
    path.write_text("hello\n")
    with pytest.raises(InvalidRequest, match="line 1"):
        list(read(path))


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '{"event": {}}',
        '{"event": {"$Tick": {"when": 1.0}}}',
        '{"event": {"$Tick": {"at": {"$enum": ["State", "asleep?"]}}}}',
        '{"event": {"$f": "many"}}',
        '{"note": 1}',
    ],
)
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "broken.jsonl"
    path.write_text(
        f'{{"llmd_recording": 1}}\n{{"event": {{"$Tick": {{"at": 0.5}}}}}}\n{line}\n'
    )
    with pytest.raises(InvalidRequest, match=r"broken.jsonl, line 3"):
        [*read(path)]
    path.write_text("[]\n")
    with pytest.raises(InvalidRequest, match="line 1"):
        [*read(path)]
