"""Each policy wants what its signal says, and says why."""

import math

import pytest

import llmd
from llmd import commands as c
from llmd import events as e
from llmd.autoscaler import (
    Autoscaler,
    Consolidation,
    Count,
    Forecast,
    Kpa,
    Largest,
    LatencySlo,
    Percent,
    Pool,
    Pools,
    Quantile,
    Rules,
    Select,
    TargetConcurrency,
    TargetKV,
    TargetMetric,
    TargetQueue,
    TargetUtilisation,
    TargetWait,
    TokenSupply,
)
from llmd.errors import InvalidPolicy, PolicyError
from llmd.recommendation import Proposal
from llmd.sim import Rollout, Slo
from llmd.types import State


class Told(Autoscaler):
    wish = 1.0

    def wanted(self, view):
        return self.wish


def course(scaler, bench, wishes, step=1.0):
    counts = []
    for wish in wishes:
        scaler.wish = wish
        bench.wait(step)
        counts.append(scaler.target(bench.view))
    return counts


# The wrapper ----------------------------------------------------------------


def test_growth_is_at_once_and_shrinking_waits(make_bench):
    scaler = Told(max_workers=9, patience=3.0)
    counts = course(scaler, make_bench(1), [4, 2, 2, 2, 2, 2])
    assert counts == [4, 4, 4, 2, 2, 2]
    assert "patience" not in scaler.advice.explain()


def test_what_holds_the_count_is_told(make_bench):
    scaler = Told(
        max_workers=9,
        patience=3.0,
        tolerance=0.1,
        up=Rules(rates=(Count(2, 10.0),)),
    )
    bench = make_bench(1)
    assert course(scaler, bench, [8]) == [3]
    assert "8 -> 3 by up.rates" in scaler.advice.explain()
    assert course(scaler, bench, [3.2]) == [3]
    assert "4 -> 3 by tolerance: 3.2 is within 0.1 of 3" in scaler.advice.explain()
    assert course(scaler, bench, [1]) == [3]
    assert "1 -> 3 by patience" in scaler.advice.explain()
    assert course(scaler, bench, [40] * 40)[-1] == 9
    assert "9 kept by" not in scaler.advice.explain()
    assert "-> 9 by max_workers" in scaler.advice.explain()


def test_growth_may_be_made_to_wait(make_bench):
    scaler = Told(max_workers=9, up=Rules(window=3.0))
    assert course(scaler, make_bench(1), [5, 5, 5, 5, 2]) == [1, 1, 1, 5, 5]


def test_zero_wakes_at_once(make_bench):
    scaler = Told(min_workers=0, max_workers=9, patience=2.0, up=Rules(window=60.0))
    assert course(scaler, make_bench(1), [0, 0, 0, 3]) == [1, 1, 0, 3]


def test_disabled_directions_stand_still(make_bench):
    off = Rules(select=Select.DISABLED)
    scaler = Told(max_workers=9, patience=0.0, up=off, down=off)
    assert course(scaler, make_bench(4), [1, 9, 1]) == [4, 4, 4]


def test_bounds_are_met_at_once(make_bench):
    rates = Rules(rates=(Percent(1, 60.0),))
    scaler = Told(min_workers=3, max_workers=5, up=rates, down=rates)
    assert course(scaler, make_bench(1), [4])[0] == 3
    scaler = Told(max_workers=2, down=rates)
    assert course(scaler, make_bench(6), [6])[0] == 2


def test_a_broken_wish_is_named_and_changes_nothing(make_bench):
    scaler, bench = Told(max_workers=9), make_bench(1)
    scaler.wish = math.nan
    with pytest.raises(PolicyError, match=r"^Told wants nan workers$"):
        scaler.target(bench.view)
    assert course(scaler, bench, [4]) == [4]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Told(min_workers=3, max_workers=2),
        lambda: Told(patience=-1.0),
        lambda: Rules(window=9999.0),
        lambda: Rules(tolerance=-0.1),
        lambda: Count(0, 15.0),
        lambda: Count(1, 0.0),
        lambda: Count(math.nan, 15.0),
        lambda: Count("1", 15.0),
        lambda: Count(True, 15.0),
        lambda: Count(1, "15"),
        lambda: Percent(math.inf, 15.0),
        lambda: Percent(2.5, 15.0),
        lambda: Rules(window="9"),
        lambda: Rules(tolerance="0.1"),
        lambda: Told(patience="5"),
        lambda: Told(tolerance=None),
        lambda: TargetConcurrency(requests_per_worker=0),
        lambda: TargetConcurrency(requests_per_worker=math.nan),
        lambda: TargetConcurrency(requests_per_worker="five"),
        lambda: TokenSupply(grow_at=0.5, shrink_at=0.6),
        lambda: Largest(policies=()),
        lambda: Pools(pools={"a": Pool(policy=Told(min_workers=1))}, budget=0),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(InvalidPolicy):
        make()


# The cluster ----------------------------------------------------------------


def test_a_cluster_asks_only_for_changes(make_bench):
    bench = make_bench(1)
    bench.cluster.autoscaler = TargetConcurrency(requests_per_worker=2, max_workers=5)
    assert bench.cluster.handle(e.Tick(1.0)) == [c.Scale(1)]
    bench.wait(1.0)
    bench.arrive(7)
    [scale] = bench.cluster.handle(e.Tick(2.0))
    assert scale.workers == 4
    assert "TargetConcurrency wants 3.5" in scale.advice.explain()
    assert bench.cluster.handle(e.Tick(3.0)) == []


def test_starting_workers_are_supply_and_not_ready(make_bench):
    bench = make_bench(2)
    bench.join(State.STARTING)
    bench.join(State.LOADING)
    bench.join(State.WARMING)
    bench.join(State.DRAINING)
    bench.join(State.SLEEPING)
    workers = bench.view.workers
    assert (workers.supply().sum(), workers.ready().sum()) == (5, 2)
    assert Told(max_workers=9).recommend(bench.view).current == 5


def test_totals_count_what_came_and_went(make_bench):
    bench = make_bench(1)
    bench.arrive(2, prompt_tokens=30)
    [first, _] = bench.running
    worker = bench.there[0]
    bench.cluster.handle(e.FirstToken(0.0, worker, first))
    bench.cluster.handle(e.TokensGenerated(0.0, worker, first, 4))
    bench.cluster.handle(e.RequestEnded(0.0, worker, first))
    totals = bench.view.totals
    assert (totals.requests, totals.prompt_tokens, totals.ended_requests) == (2, 60, 1)
    assert totals.generated_tokens == 5
    assert 0 < totals.uncached_tokens <= 60


LOAD = TargetConcurrency(requests_per_worker=1)
FROM_ZERO = {"min_workers": 0, "max_workers": 3}


@pytest.mark.parametrize(
    "scaler",
    [
        Kpa(requests_per_worker=7, **FROM_ZERO),
        LatencySlo(**FROM_ZERO),
        TargetWait(wait=2.0, **FROM_ZERO),
        Forecast(rate_per_worker=1, **FROM_ZERO),
        Quantile(policy=LOAD, **FROM_ZERO),
        Rollout(slo=Slo(ttft_s=1.0, tpot_s=1.0), **FROM_ZERO),
    ],
    ids=lambda scaler: type(scaler).__name__,
)
def test_before_anything_has_happened_nothing_is_wanted(scaler):
    cluster = llmd.Cluster()
    assert scaler.target(cluster.view) == 0
    for at in (5.0, 50.0):  # and nothing of it is remembered
        cluster.handle(e.Tick(at))
        assert scaler.target(cluster.view) == 0


# One signal -----------------------------------------------------------------


def test_queue_counts_both_queues(make_bench):
    bench = make_bench(1)
    bench.cluster.balancer = llmd.Fcfs(max_running=3)
    bench.arrive(10)
    assert TargetQueue(waiting_per_worker=4).wanted(bench.view) == 10 / 4


def test_wait_follows_the_oldest(make_bench):
    bench = make_bench(2)
    bench.cluster.balancer = llmd.Fcfs(max_running=0)
    bench.arrive(3)
    bench.wait(6.0)
    assert TargetWait(wait=2.0).wanted(bench.view) == 2 * 6.0 / 2.0


def test_kv_counts_what_waits(make_bench):
    bench = make_bench(2, kv_blocks=100)  # 1600 tokens each
    bench.cluster.balancer = llmd.Fcfs(max_running=1)
    bench.arrive(4, prompt_tokens=800)
    assert TargetKV(usage=0.5).wanted(bench.view) == 3200 / 800


def test_any_measurement_will_do(make_bench):
    bench, told = make_bench(1), [30.0]
    scaler = TargetMetric(measure=lambda view: told[0], per_worker=8, max_workers=9)
    assert scaler.target(bench.view) == 4
    told[0] = math.nan
    bench.wait(1000.0)
    assert scaler.target(bench.view) == 4
    assert "cannot tell: the measurement is NaN" in scaler.advice.explain()


def test_gpu_utilisation_comes_with_a_warning(make_bench):
    with pytest.warns(UserWarning, match="near 1 whenever a batch runs"):
        scaler = TargetUtilisation(measure=lambda view: 1.0, max_workers=9)
    bench = make_bench(1)
    # Why: one request keeps it at 1, and the count climbs whatever the load.
    counts = []
    for _ in range(20):
        counts.append(scaler.target(bench.view))
        bench.fit(counts[-1])
        bench.wait(1.0)
    assert counts[-1] == 9


def test_the_largest_counts_and_a_silent_one_forbids_to_shrink(make_bench):
    bench, told = make_bench(1), [20.0]
    queue = TargetMetric(measure=lambda view: told[0], per_worker=10)
    load = TargetConcurrency(requests_per_worker=2)
    scaler = Largest(policies=(queue, load), max_workers=9, patience=0.0)
    bench.load(10)
    assert scaler.target(bench.view) == 5
    told[0] = math.nan
    bench.load(2)
    bench.wait(10.0)
    assert scaler.target(bench.view) == 5
    assert "might have asked for more" in scaler.advice.explain()
    told[0] = 20.0
    bench.wait(10.0)
    assert scaler.target(bench.view) == 2


class Endless(Autoscaler):
    """Proposes, and wants, what is no count."""

    def wanted(self, view):
        return math.inf

    def proposals(self, view):
        return (Proposal("rate over nothing", math.inf),)


@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan, Endless()])
def test_one_that_wants_no_count_is_told_of_and_does_not_count(make_bench, broken):
    bench, load = make_bench(1), TargetConcurrency(requests_per_worker=2)
    if not isinstance(broken, Autoscaler):
        wish, broken = broken, Told()
        broken.wish = wish
    bench.cluster.autoscaler = Largest(
        policies=(broken, load), max_workers=9, patience=0.0
    )
    bench.load(8)
    bench.wait(1.0)
    [scale] = bench.cluster.handle(e.Tick(bench.now))
    assert scale.workers == 4
    named = "rate over nothing" if isinstance(broken, Endless) else "Told"
    assert f"{named} cannot tell: " in scale.advice.explain()
    bench.load(2)
    bench.wait(1.0)
    assert bench.cluster.handle(e.Tick(bench.now)) == []  # it may have wanted more
    broken = Largest(policies=(broken,), max_workers=9)
    assert broken.target(bench.view) == 1  # what is there stays


def test_a_proposal_of_no_count_is_refused(make_bench):
    with pytest.raises(PolicyError, match="Endless wants inf workers"):
        Endless(max_workers=9).target(make_bench(1).view)


def test_consolidation_leaves_room_for_who_stays(make_bench):
    bench = make_bench(3)
    inner = TargetConcurrency(requests_per_worker=10)
    scaler = Consolidation(policy=inner, max_workers=9, patience=0.0, ceiling=0.9)
    bench.load(19)  # 0.95 of two workers
    assert scaler.target(bench.view) == 3
    bench.load(18)
    bench.wait(1.0)
    assert scaler.target(bench.view) == 2
