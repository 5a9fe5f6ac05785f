"""Who may enter: rates, deadlines, saturation, and signals too old to use."""

import math

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

import llmd
from llmd import balancer as b
from llmd import events as e
from llmd.errors import PolicyError, Rejected
from llmd.machines import Machine


def gated(*gates, order=None, rooms=()):
    return b.FlowControl(order or b.Fcfs(), gates=gates, rooms=rooms)


def refusal(sim, id):
    error = sim.failed[id]
    assert isinstance(error, Rejected)
    return error


def test_a_rate_is_kept_for_each_tenant(shop):
    sim = shop(gated(b.RateLimit(requests_per_min=60.0, burst_s=2.0)))
    assert [sim.arrive("a") in sim.failed for _ in range(3)] == [False, False, True]
    assert sim.arrive("b") not in sim.failed
    sim.wait(1.0)
    assert [sim.arrive("a") in sim.failed for _ in range(2)] == [False, True]


def test_retry_after_is_when_a_retry_works(shop):
    gate = b.RateLimit(requests_per_min=30.0, tokens_per_min=600.0, burst_s=10.0)
    for prompt, seconds in ((1, 2.0), (80, 6.0)):
        sim = shop(gated(gate), places=99)
        tenant = f"t{prompt}"
        while (id := sim.arrive(tenant, prompt)) not in sim.failed:
            pass
        after = refusal(sim, id).retry_after
        assert after == pytest.approx(seconds)
        sim.wait(after * 0.9)
        assert sim.arrive(tenant, prompt) in sim.failed
        sim.wait(after * 0.1 + 1e-6)
        assert sim.arrive(tenant, prompt) not in sim.failed


def test_output_is_charged_as_it_comes(shop):
    sim = shop(gated(b.RateLimit(tokens_per_min=60.0, burst_s=60.0)))
    id = sim.arrive("a", 10)
    sim.token(id)
    sim.token(id, 99)
    assert "tokens a minute" in refusal(sim, sim.arrive("a", 1)).reason
    sim.wait(50.0)
    assert sim.arrive("a", 1) in sim.failed
    sim.wait(2.0)
    assert sim.arrive("a", 1) not in sim.failed


def test_a_prompt_longer_than_the_bucket_is_not_refused_for_ever(shop):
    sim = shop(gated(b.RateLimit(tokens_per_min=60.0, burst_s=10.0)))
    assert sim.arrive("a", 500) not in sim.failed
    assert sim.arrive("a", 500) in sim.failed


@settings(
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.floats(0, 3), max_size=60), st.floats(1, 20))
def test_no_more_enter_than_burst_and_rate(shop, gaps, burst_s):
    sim = shop(gated(b.RateLimit(requests_per_min=60.0, burst_s=burst_s)), places=999)
    entered = []
    for gap in gaps:
        sim.wait(gap)
        if sim.arrive("a") not in sim.failed:
            entered.append(sim.now)
    for number, start in enumerate(entered):
        for count, stop in enumerate(entered[number:], 1):
            assert count <= burst_s + (stop - start) + 1e-6


def test_a_refusal_takes_nothing_from_the_bucket(shop):
    full = b.QueueFull(requests=1)
    sim = shop(gated(full, b.RateLimit(requests_per_min=60.0, burst_s=4.0)), places=1)
    sim.arrive("a")
    sim.arrive("a")
    for _ in range(9):
        assert "queue full" in refusal(sim, sim.arrive("a")).reason
    sim.drain()
    assert sim.arrive("a") not in sim.failed


def test_a_full_queue_says_when_the_next_leaves_it(shop):
    sim = shop(gated(b.QueueFull(requests=2)), places=1)
    for _ in range(3):
        sim.arrive("a")
    assert math.isnan(refusal(sim, sim.arrive("a")).retry_after)
    sim.now += 4.0
    sim.end(next(iter(sim.where)))
    sim.arrive("a")
    assert refusal(sim, sim.arrive("a")).retry_after == pytest.approx(4.0)


def test_a_deadline_is_tried_again_when_those_who_wait_are_done(shop):
    sim = shop(gated(b.DeadlineInfeasible()), places=1)
    for _ in range(10):
        sim.arrive("a", 8000)
    refused = refusal(sim, sim.arrive("a", 100, deadline=sim.now + 0.5))
    queued = sum(r.prompt_tokens for r in sim.cluster.view.waiting)
    seconds = queued / 1024 * llmd.Machine().prefill_s(1024.0)
    assert 0 < refused.retry_after <= seconds
    # Nothing helps one whose own prompt takes too long.
    sim.drain()
    alone = refusal(sim, sim.arrive("a", 8000, deadline=sim.now + 1e-3))
    assert math.isnan(alone.retry_after)


SPECS = st.tuples(
    st.sampled_from(["arrive", "end", "token", "cancel", "wait"]),
    st.integers(0, 2),
    st.integers(1, 400),
)


@settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(SPECS, min_size=20, max_size=80))
def test_a_verdict_says_what_becomes_of_a_request(shop, specs):
    bands = [b.Band(order=b.Vtc(), max_wait=3.0, ceiling=c) for c in (1.0, 0.8, 0.5)]
    rooms = [b.FixedRoom(prefill_tokens=500), b.LongPrefillCap(long_tokens=300)]
    gates = [b.QueueFull(requests=4), b.RateLimit(requests_per_min=600.0, burst_s=1.0)]
    sim = shop(b.FlowControl(b.Bands(bands, every=2), gates, rooms), workers=2)
    for count, (what, band, tokens) in enumerate(specs):
        if what == "arrive":
            fields = {"priority": band, "tenant": f"t{tokens % 3}", "salt": f"{count}"}
            asked = llmd.Request(id=f"{count}", prompt=range(tokens), **fields)
            sim.requests[asked.id] = asked
            outcome = sim.cluster.verdict(asked).outcome
            assert sim.cluster.verdict(asked).outcome == outcome
            sim.feed(e.RequestArrived(sim.now, asked))
            if outcome == "admit":
                assert asked.id in sim.where
            assert (outcome == "reject") == (asked.id in sim.failed)
        elif what == "wait":
            sim.wait(tokens / 200)
        elif sim.where:
            id = list(sim.where)[tokens % len(sim.where)]
            getattr(sim, what)(id)


def test_a_verdict_tells_those_who_wait_from_those_who_go(shop):
    sim = shop(gated(b.QueueFull(requests=1)), places=1)

    def verdict(**fields):
        return sim.cluster.verdict(llmd.Request(id="r", prompt=[1], **fields))

    assert verdict().outcome == "admit"
    sim.arrive("a")
    waits = verdict()
    assert waits.outcome == "queue"
    assert waits.explain().endswith("admitted, to wait")
    sim.arrive("a")
    assert verdict().outcome == "reject"
    assert len(sim.cluster.waiting) == 1
    with pytest.raises(llmd.errors.UnknownAdapter):
        verdict(lora="none")


def test_buckets_are_bounded(shop):
    gate = b.RateLimit(requests_per_min=1.0, max_tenants=20)
    sim = shop(gated(gate), places=1000)
    for number in range(200):
        sim.arrive(f"t{number}")
    assert len(gate._buckets) <= 21
    sim.wait(3600.0)
    for number in range(30):
        sim.arrive(f"u{number}")
    assert not any(str(tenant).startswith("t") for tenant in gate._buckets)


def test_a_rate_that_never_lets_one_in_is_refused():
    with pytest.raises(PolicyError):
        b.RateLimit(requests_per_min=1.0, burst_s=1.0)


def test_the_queue_is_bounded_in_tokens(shop):
    sim = shop(gated(b.QueueFull(tokens=100)), places=1)
    sim.arrive(prompt=90)
    sim.arrive(prompt=90)
    assert "tokens" in refusal(sim, sim.arrive(prompt=11)).reason
    assert sim.arrive(prompt=10) not in sim.failed


def test_who_cannot_be_served_in_time_is_told_at_once(shop):
    prefill_s = Machine().prefill_s(1000.0)
    sim = shop(gated(b.DeadlineInfeasible()), places=1)
    assert sim.arrive(prompt=1000, deadline=1.5 * prefill_s) not in sim.failed
    late = sim.arrive(prompt=1000, deadline=1.5 * prefill_s)
    assert "deadline" in refusal(sim, late).reason
    assert sim.arrive(prompt=1000, deadline=3.0 * prefill_s) not in sim.failed
    assert sim.arrive(prompt=1000) not in sim.failed


def test_saturation_refuses_the_lower_share_first(shop):
    bands = b.Bands([b.Band(), b.Band(ceiling=0.5)])
    sim = shop(gated(b.Saturation(max_wait_s=1.0), order=bands), places=1)
    seconds = Machine().prefill_s(1024.0)
    sim.arrive(prompt=1024)
    while sim.cluster.view.waiting.prompt_tokens / 1024 * seconds < 0.6:
        sim.arrive(prompt=1024, priority=0)
    low = refusal(sim, sim.arrive(priority=1))
    assert low.retry_after == pytest.approx(0.1, abs=0.05)
    assert sim.arrive(priority=0) not in sim.failed


def report(sim, usage, measured_at):
    signals = llmd.Signals(kv_usage=usage)
    sim.feed(e.SignalsReported(sim.now, "w0", signals, measured_at))


def test_a_stale_report_is_not_believed_and_said_so(shop):
    gate = b.Saturation(max_kv_usage=0.8, stale_s=5.0)
    sim = shop(gated(gate))
    request = llmd.Request(id="probe", prompt=[1])
    sim.now = 10.0
    report(sim, 0.95, measured_at=9.0)
    view = sim.cluster.view
    fresh = gate.check(request, 1.0, view)
    assert not fresh.passed
    assert fresh.value == pytest.approx(0.95 / 0.8)
    sim.wait(6.0)
    verdict = sim.cluster.balancer.admit(request, view)
    assert verdict.admitted
    assert "1 of 1 reports stale, own books used" in verdict.explain()


@pytest.mark.parametrize("age", [0.0, math.inf, math.nan])
def test_no_report_whatever_it_says_halts_dispatch(shop, age):
    gate = b.Saturation(max_kv_usage=0.5)
    sim = shop(gated(gate), places=1)
    running = sim.arrive()
    waiting = sim.arrive()
    report(sim, 1.0, measured_at=sim.now - age if age < math.inf else math.nan)
    sim.end(running)
    assert sim.sent[-1] == waiting


def test_every_cause_of_a_refusal_is_named(shop):
    gates = b.RateLimit(requests_per_min=60.0, burst_s=1.0), b.QueueFull(requests=0)
    verdict = b.Verdict.of(
        [
            gate.check(
                llmd.Request(id="r", prompt=[1]), 1.0, shop(b.Fcfs()).cluster.view
            )
            for gate in gates
        ]
    )
    assert not verdict.admitted
    assert verdict.explain().count("\n") == 2


def two_models(gate):
    """Two workers of a model each; A's has work for a long time before it."""
    cluster = llmd.Cluster(balancer=b.FlowControl(gates=[gate]))
    for model in "AB":
        worker = llmd.Worker(id=model, models={model}, max_running=1)
        cluster.handle(e.WorkerJoined(0.0, worker))
    for number in range(41):
        request = llmd.Request(
            id=f"a{number}", prompt=range(8000), salt=f"{number}", model="A"
        )
        cluster.handle(e.RequestArrived(0.0, request))
    return cluster


@pytest.mark.parametrize(
    "gate", [b.Saturation(max_wait_s=1e6), b.DeadlineInfeasible()], ids=str
)
def test_what_waits_for_other_workers_keeps_nobody_out(gate):
    cluster = two_models(gate)
    assert len(cluster.waiting) == 40
    if isinstance(gate, b.Saturation):
        gate.max_wait_s = 1.0

    def outcome(model):
        request = llmd.Request(id="r", prompt=range(100), model=model, deadline=0.5)
        return cluster.verdict(request).outcome

    assert outcome("B") == "admit"
    assert outcome("A") == "reject"


def test_models_on_one_worker_wait_for_each_other():
    cluster = llmd.Cluster(balancer=b.FlowControl())
    both = llmd.Worker(id="w", models={"A", "B"}, max_running=1)
    other = llmd.Worker(id="v", models={"C"}, max_running=1)
    for worker in (both, other):
        cluster.handle(e.WorkerJoined(0.0, worker))
    for number in range(3):
        request = llmd.Request(id=f"{number}", prompt=range(50), model="A")
        cluster.handle(e.RequestArrived(0.0, request))

    def before(model):
        request = llmd.Request(id="r", prompt=[1], model=model)
        return cluster.waiting.tokens_before(request, cluster.view)

    assert [before(model) for model in ("A", "B", "C", "")] == [100, 100, 0, 100]


def test_explanations_tell_what_was_counted(shop):
    gates = [b.RateLimit(requests_per_min=60.0), b.QueueFull(requests=10)]
    sim = shop(b.FlowControl(gates=gates), places=1)
    for _ in range(9):
        sim.arrive("t")
    lines = sim.cluster.verdict(llmd.Request(id="r", prompt=[1], tenant="t")).explain()
    assert "rate limit: 10 <= 60 requests a minute" in lines
    assert "queue full: 9 <= 10 requests" in lines


@pytest.mark.parametrize(
    "order",
    [
        b.Bands([b.Band(name="x", max_tokens=100)]),
        b.FlowControl(gates=[b.QueueFull(tokens=100)]),
        b.FlowControl(gates=[b.QueueFull(requests=0)]),
    ],
    ids=["band", "tokens", "requests"],
)
def test_who_never_fits_is_not_told_to_come_back(shop, order):
    sim = shop(order, places=1)
    for _ in range(3):
        sim.arrive(prompt=10)
        sim.now += 1.0
        sim.drain()
    id = sim.arrive(prompt=200)
    assert math.isnan(sim.failed[id].retry_after)
