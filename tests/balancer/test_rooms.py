"""How much a worker may hold."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import llmd
from llmd import balancer as b
from llmd.errors import PolicyError
from llmd.sim import Job, Simulator, Workload, fleet


def roomy(*rooms):
    return b.FlowControl(b.Fcfs(), rooms=rooms)


def test_fixed_rooms_count_requests_tokens_and_prefill(shop):
    for room, fits in (
        (b.FixedRoom(requests=2), 2),
        (b.FixedRoom(kv_usage=0.5), 5),
        (b.FixedRoom(prefill_tokens=350), 3),
    ):
        sim = shop(roomy(room), places=9, kv_blocks=100, block_tokens=10)
        for _ in range(9):
            sim.arrive(prompt=100)
        assert len(sim.sent) == fits


def test_an_idle_worker_takes_what_is_too_large(shop):
    sim = shop(roomy(b.FixedRoom(kv_usage=0.1)), kv_blocks=100, block_tokens=10)
    first = sim.arrive(prompt=900)
    second = sim.arrive(prompt=900)
    assert sim.sent == [first]
    sim.end(first)
    assert sim.sent == [first, second]


def steady(shop, aimd, itl_s, seconds=120.0):
    """Run a worker that is always asked for more; return running by second."""
    sim = shop(roomy(aimd), places=400)
    history = []
    while sim.now < seconds:
        while not sim.waiting:
            sim.arrive(prompt=1)
        running = list(sim.where)
        sim.now += itl_s(len(running))
        for id in running:
            sim.token(id)
        for id in running[: max(len(running) // 20, 1)]:
            sim.end(id)
        history.append(len(sim.where))
    return history


def test_aimd_holds_the_target_at_the_most_that_meets_it(shop):
    # A step of 10 ms and 1 ms a request: 40 running make 50 ms.
    aimd = b.AimdRoom(itl_s=0.0505, start=4, increase=2.0, window_s=0.5)
    history = steady(shop, aimd, lambda running: 0.010 + 0.001 * running)
    settled = history[len(history) // 2 :]
    assert 28 <= sum(settled) / len(settled) <= 41
    assert max(settled) <= 44


def test_aimd_follows_a_worker_that_slows_down(shop):
    aimd = b.AimdRoom(itl_s=0.05, start=200, window_s=0.5)
    history = steady(shop, aimd, lambda running: 0.005 * running, seconds=60.0)
    assert max(history[-20:]) <= 12


def test_aimd_does_not_grow_on_what_was_not_tried(shop):
    aimd = b.AimdRoom(itl_s=1.0, start=10, samples=1)
    sim = shop(roomy(aimd), places=400)
    id = sim.arrive()
    for _ in range(50):
        sim.now += 0.5
        sim.token(id)
    assert aimd.limit("w0") == 10


def test_aimd_on_first_tokens(shop):
    aimd = b.AimdRoom(ttft_s=0.1, start=8, samples=4, window_s=0.5)
    sim = shop(roomy(aimd), places=400)
    for _ in range(8):
        ids = [sim.arrive() for _ in range(8)]
        sim.now += 1.0
        for id in ids:
            if id in sim.where:
                sim.token(id)
        sim.drain()
    assert aimd.limit("w0") < 4


@pytest.mark.parametrize(
    "wrong",
    [{"start": 0}, {"lowest": 9, "start": 3}, {"decrease": 1.0}, {"increase": 0.0}],
)
def test_aimd_refuses_what_cannot_work(wrong):
    with pytest.raises(PolicyError):
        b.AimdRoom(**wrong)


def test_long_prompts_take_turns_and_short_ones_pass(shop):
    sim = shop(roomy(b.LongPrefillCap(long_tokens=100)), places=9)
    sim.arrive(prompt=100, id="long")
    sim.arrive(prompt=100, id="second long")
    sim.arrive(prompt=99, id="short")
    assert sim.sent == ["long", "short"]
    sim.token("long")
    assert sim.sent == ["long", "short", "second long"]
    sim.arrive(prompt=100, id="third long")
    sim.cancel("second long")
    assert sim.sent[-1] == "third long"


def test_long_prompts_spread_over_workers(shop):
    sim = shop(roomy(b.LongPrefillCap(long_tokens=100)), workers=2)
    for _ in range(3):
        sim.arrive(prompt=200)
    assert sorted(sim.where.values()) == ["w0", "w1"]


def test_some_workers_are_kept_free_of_long_prompts(shop):
    room = b.LongPrefillCap(at_once=2, long_tokens=100, spare=0.5)
    sim = shop(roomy(room), workers=4, places=9)
    for _ in range(9):
        sim.arrive(prompt=200)
    busy = set(sim.where.values())
    assert len(sim.where) == 4
    assert len(busy) == 2
    assert sim.where[sim.arrive(prompt=99)] not in busy


def test_a_prompt_budget_spreads_prompts_out(shop):
    room = b.PromptBudget(tokens=100.0, window_s=1.0)
    sim = shop(roomy(room), places=99)
    for _ in range(6):
        sim.arrive(prompt=60)
    assert len(sim.sent) == 2
    sim.wait(0.1)
    assert len(sim.sent) == 2
    sim.wait(0.2)
    assert len(sim.sent) == 3
    sim.wait(9.0)
    assert len(sim.sent) == 5


@settings(
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 300)), max_size=40))
def test_a_budget_is_never_overdrawn_by_more_than_one_prompt(shop, arrivals):
    room = b.PromptBudget(tokens=100.0, window_s=1.0)
    sim = shop(roomy(room), places=99)
    for gap, prompt in arrivals:
        sim.wait(gap)
        sim.arrive(prompt=prompt)
        assert room.left("w0", sim.now) >= -300
    while sim.waiting:
        sim.wait(1.0)
    assert len(sim.sent) == len(arrivals)


def of_time(room, seconds):
    """Run three prompts in the simulator with nothing else to wake it."""
    jobs = [
        Job(
            request=llmd.Request(id=f"r{n}", prompt=range(20_000), salt=f"{n}"),
            output_tokens=2,
            at=0.0,
        )
        for n in range(3)
    ]
    simulator = Simulator(llmd.Cluster(balancer=roomy(room)))
    return simulator.run(Workload(name="w", jobs=jobs), fleet(1), until=seconds)


def test_what_time_alone_allows_happens_in_the_simulator_too():
    report = of_time(b.PromptBudget(tokens=1000, window_s=1.0), 1000.0)
    # Each overdraws what 19 and 39 seconds make good.
    assert report.completed == 3
    waits = np.sort(report.dispatched - report.arrived)
    assert waits == pytest.approx([0.0, 19.0, 39.0], abs=0.01)


def test_a_worker_warms_up_in_the_simulator_too():
    report = of_time(b.SlowStart(ramp=30.0, first=1), 1000.0)
    assert report.completed == 3


def test_a_limit_that_grew_is_used_at_once(shop):
    aimd = b.AimdRoom(itl_s=5.0, start=2, samples=1)
    sim = shop(roomy(aimd), places=9)
    ids = [sim.arrive() for _ in range(4)]
    for id in ids[:2]:
        sim.token(id)
    sim.now = 2.0
    sim.token(ids[0])  # a window of fast tokens: no event but this one
    assert ids[2] in sim.sent
