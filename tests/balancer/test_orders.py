"""Orders inside one flow."""

import hypothesis.strategies as st
from hypothesis import HealthCheck, assume, given, settings

import llmd
from llmd import balancer as b
from llmd import events as e
from llmd.machines import Machine

PROMPT = 1000
UNIT_S = Machine().prefill_s(float(PROMPT))


def feasible(jobs):
    """Say whether unit jobs (release, deadline) can all be done in time.

    Demand in every interval at most its length: necessary, and for jobs of
    one unit with whole releases sufficient.
    """
    releases = {release for release, _ in jobs}
    deadlines = {deadline for _, deadline in jobs}
    return all(
        sum(r >= start and d <= stop for r, d in jobs) <= stop - start
        for start in releases
        for stop in deadlines
        if stop > start
    )


jobs_in_time = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 8)).map(lambda j: (j[0], j[0] + j[1])),
    min_size=1,
    max_size=14,
)


def misses(shop, order, jobs, due):
    """Run unit jobs (release, deadline) on one place; count the late ones."""
    sim, late, done, now = shop(order, places=1), 0, 0, 0
    while done < len(jobs):
        sim.now = now * UNIT_S
        ended = list(sim.where)
        # All of one moment are there before any of them is sent.
        sim.feed(e.WorkerChanged(sim.now, "w0", state=llmd.State.DRAINING))
        for number, (release, deadline) in enumerate(jobs):
            if release == now:
                # A moment's grace for sums of floats.
                due[f"{number}"] = deadline * UNIT_S + 1e-6
                sim.arrive(prompt=PROMPT, id=f"{number}")
        for id in ended:
            late += jobs[int(id)][1] < now
            done += 1
            sim.end(id)
        sim.feed(e.WorkerChanged(sim.now, "w0", state=llmd.State.READY))
        now += 1
    return late


def edf(due):
    class Known(b.Edf):
        def due(self, request, since):
            return due[request.id]

    return Known()


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.filter_too_much,
    ],
)
@given(jobs_in_time)
def test_edf_misses_nothing_that_can_be_met(shop, jobs):
    assume(feasible(jobs))
    due = {}
    assert misses(shop, edf(due), jobs, due) == 0


def test_first_come_first_served_does_miss_some(shop):
    # What the property above would find if the order were wrong.
    jobs = [(0, 1), (1, 9), (1, 8), (1, 2)]
    assert feasible(jobs)
    assert misses(shop, b.Fcfs(), jobs, {}) > 0


def test_who_cannot_make_it_any_more_makes_nobody_late(shop):
    due = {"running": 9.0}
    sim = shop(edf(due), places=1)
    running = sim.arrive(prompt=PROMPT, id="running")
    due |= {"late": 1.5 * UNIT_S, "fine": 3.5 * UNIT_S}
    sim.arrive(prompt=PROMPT, id="late")
    sim.arrive(prompt=PROMPT, id="fine")
    sim.now = UNIT_S
    sim.end(running)
    assert sim.sent[-1] == "fine"
    assert sim.drain() == ["fine", "late"]


def test_edf_takes_the_cached_one_later_as_it_has_more_slack(shop):
    shared = list(range(64))
    sim = shop(b.SloDeadline(ttft_s=lambda request: 1.0), places=1)
    running = sim.arrive(prompt=shared)
    sim.arrive(prompt=64, id="cold")
    sim.arrive(prompt=[*shared, 5], id="warm")
    sim.end(running)
    # Less to compute is more slack at one deadline, so the cold one is first.
    assert sim.drain() == ["cold", "warm"]


def test_shortest_prefill_ages(shop):
    sim = shop(b.ShortestPrefill(ageing_tokens_per_s=100.0), places=1)
    running = sim.arrive(prompt=10)
    sim.arrive(prompt=500, id="long")
    sim.arrive(prompt=50, id="short")
    sim.wait(6.0)
    sim.arrive(prompt=50, id="shorter but later")
    sim.end(running)
    assert sim.drain() == ["short", "long", "shorter but later"]


def test_weighted_shortest_goes_by_worth_over_work(shop):
    worth = {"gold": 4.0, "iron": 1.0}
    order = b.WeightedShortest(worth=lambda request: worth[request.tenant])
    sim = shop(order, places=1)
    running = sim.arrive("iron", 10, max_new_tokens=1)
    sim.arrive("iron", 100, max_new_tokens=20, id="iron")
    sim.arrive("gold", 300, max_new_tokens=20, id="gold")
    sim.arrive("iron", 30, max_new_tokens=20, id="short iron")
    sim.end(running)
    assert sim.drain() == ["short iron", "gold", "iron"]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), max_size=20))
@settings(
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_equal_keys_leave_in_order_of_arrival(shop, arrivals):
    sim = shop(b.Fcfs(), places=1)
    ids = [
        (priority, number, sim.arrive(prompt=tokens, priority=priority))
        for number, (priority, tokens) in enumerate(arrivals)
    ]
    # The first left at once; it had nobody to be compared with.
    assert sim.drain() == [id for _, _, id in [*ids[:1], *sorted(ids[1:])]]
