"""Each policy wants what its signal says, and says why."""

import itertools
import math

import attrs
import hypothesis.strategies as st
import pytest
from hypothesis import given

import llmd
from llmd import commands as c
from llmd import events as e
from llmd.autoscaler import (
    Autoscaler,
    Cheapest,
    Consolidation,
    Count,
    Forecast,
    HoltWinters,
    Kpa,
    Largest,
    LatencySlo,
    Load,
    Offer,
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
from llmd.autoscaler.hpa import AverageValue, Hpa, HpaSpec, Pods
from llmd.errors import InvalidPolicy, NoSignal, PolicyError
from llmd.recommendation import Proposal
from llmd.types import Role, State


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


# Bursts ---------------------------------------------------------------------


def test_kpa_panics_and_does_not_shrink_in_panic(make_bench):
    bench = make_bench(1)
    scaler = Kpa(requests_per_worker=5, max_workers=20)
    counts = []
    for second in range(200):
        bench.load(50 if 60 <= second < 70 else 2)
        bench.wait(1.0)
        counts.append(scaler.target(bench.view))
        bench.fit(counts[-1])
    assert set(counts[:60]) == {1}
    assert counts[69] >= 9
    assert counts[69:120] == [counts[69]] * 51
    assert counts[-1] == 1


def test_token_supply_has_a_dead_band(make_bench):
    bench = make_bench(2, kv_blocks=100)  # 1600 tokens each
    scaler = TokenSupply(max_workers=9)

    def wish(tokens):
        bench.load(0)
        bench.arrive(1, prompt_tokens=tokens)
        return scaler.wanted(bench.view)

    assert wish(2700) == 2  # under 0.85 of 3200
    assert wish(2800) > 2
    assert wish(2300) == 2  # over 0.7 of 3200
    assert wish(1100) == 1  # under 0.7 of 1600
    bench.join(State.STARTING)
    assert wish(4000) == 3  # what is coming counts


def test_latency_inverts_the_step_model():
    slo = LatencySlo(ttft=0.5, itl=0.02, max_workers=64)
    load = Load(400, 800_000, 0, 60_000, 2000)
    fewest = slo.fewest(load)
    ttft, itl = slo.latencies(load, fewest)
    assert ttft <= 0.7 * 0.5
    assert itl <= 0.7 * 0.02
    worse = slo.latencies(load, fewest - 1)
    assert worse[0] > 0.7 * 0.5 or worse[1] > 0.7 * 0.02
    for factor in (1, 2, 3, 5):
        heavier = Load(*[value * factor for value in (400, 8e5, 0, 6e4)], 2000)
        assert slo.fewest(heavier) >= fewest
    assert slo.fewest(Load(0, 0, 0, 0, 0)) == 0
    backlog = Load(400, 800_000, 200_000, 60_000, 2000)
    assert slo.fewest(backlog) > fewest


def test_latency_waits_until_it_has_seen_arrivals(make_bench):
    bench, scaler = make_bench(1), LatencySlo(max_workers=9)
    bench.arrive(1)
    with pytest.raises(NoSignal):
        scaler.wanted(bench.view)
    for _ in range(30):
        bench.wait(1.0)
        bench.arrive(8, prompt_tokens=4000)
        count = scaler.target(bench.view)
    assert count > 3
    assert "prompt tokens/s" in scaler.advice.explain()


def test_holt_winters_learns_a_season():
    series = HoltWinters(period=24)
    day = [100 + 80 * math.sin(2 * math.pi * hour / 24) for hour in range(24)]
    for hour in range(24 * 8):
        series.add(day[hour % 24])
    for ahead in (1, 6, 12, 24):
        assert abs(series.ahead(ahead) - day[(ahead - 1) % 24]) < 5.0


def test_forecast_asks_before_the_load_is_there(make_bench):
    bench = make_bench(1)
    scaler = Forecast(rate_per_worker=2.0, cold_start=60.0, max_workers=50)
    for second in range(300):
        bench.wait(1.0)
        if second % 10 == 0:
            bench.arrive(second // 20)  # grows by 0.005 requests/s each second
        scaler.target(bench.view)
    now, expected = 14 / 10, scaler.rate(bench.view)
    assert expected > now + 0.5 * 60 * 0.005
    assert scaler.advice.workers >= 1


# Several kinds --------------------------------------------------------------


def test_prefill_and_decode_have_their_own_counts(make_bench):
    bench = make_bench(0)
    one = Told(max_workers=8)
    two = Told(max_workers=8)
    one.wish, two.wish = 3, 6
    bench.cluster.autoscaler = Pools(
        pools={
            "prefill": Pool(policy=one, role=Role.PREFILL),
            "decode": Pool(policy=two, role=Role.DECODE),
        },
        budget=6,
    )
    first = bench.cluster.handle(e.Tick(1.0))
    assert first == [c.Scale(1, "prefill"), c.Scale(1, "decode")]
    second = bench.cluster.handle(e.Tick(2.0))
    assert second == [c.Scale(2, "prefill"), c.Scale(4, "decode")]
    assert "by budget: 9 workers shrunk to a budget of 6" in second[0].advice.explain()
    assert str(bench.cluster.autoscaler.advice) == PREFILL_AND_DECODE


PREFILL_AND_DECODE = """\
2 -> 6 workers at 2 s
  prefill: 1 -> 2 workers at 2 s
    Told wants 3
    3 -> 2 by budget: 9 workers shrunk to a budget of 6
  decode: 1 -> 4 workers at 2 s
    Told wants 6
    6 -> 4 by budget: 9 workers shrunk to a budget of 6"""


def test_what_pools_had_is_what_the_budget_left_them(make_bench):
    bench, one = make_bench(0), Told(max_workers=8)
    scaler = Pools(pools={"a": Pool(policy=one)}, budget=3)
    for current in (0, 1, 3, 3):
        one.wish = 5
        bench.wait(1.0)
        assert scaler.target(bench.view) == scaler.advice.workers
        assert scaler.advice.current == current


def test_the_cheapest_is_added_first_and_the_dearest_leaves_first(make_bench):
    load = Told(max_workers=9, patience=0.0)
    offers = (
        Offer(machine="new", price=4.0, worth=1.0, most=2),
        Offer(machine="old", price=1.0, worth=0.5, most=4),
    )
    scaler, bench = Cheapest(policy=load, offers=offers), make_bench(1)

    def counts(wish):
        load.wish = wish
        bench.wait(1.0)
        return {a.pool: a.workers for a in scaler.recommendations(bench.view)}

    counts(1)
    assert counts(1) == {"old": 2, "new": 0}
    assert counts(4) == {"old": 4, "new": 2}
    assert counts(3) == {"old": 4, "new": 1}
    assert counts(2) == {"old": 4, "new": 0}
    assert scaler.plan(9) == {"old": 4, "new": 2}
    poor = Cheapest(policy=load, offers=offers, budget=6.5)
    assert poor.plan(9) == {"old": 4, "new": 0}
    load.wish = 5
    bench.wait(1.0)
    assert poor.target(bench.view) == 4
    assert str(poor.advice) == POOR


POOR = """\
0 -> 4 workers at 6 s
  Told wants 5
  5 -> 2 by offers: all that can be had and paid is worth 2 workers
  old: 0 -> 4 workers at 6 s
    5 -> 4 by price: no more than 4 can be had
  new: 0 -> 0 workers at 6 s
    5 -> 0 by price: 2.5 an hour, at 4 each, buys no more"""


GPU = Offer(machine="gpu", price=1.0)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Cheapest(policy=Told(), offers=()), "no offers"),
        (lambda: Cheapest(policy=Told(), offers=(GPU, GPU)), "offered twice: gpu"),
        (lambda: Cheapest(policy=Told(), offers=("gpu",)), "'gpu' is no Offer"),
        *[
            (
                lambda money=money: Cheapest(
                    policy=Told(), offers=(GPU,), budget=money
                ),
                "budget",
            )
            for money in (-1, math.nan, "much", None, True)
        ],
        *[
            (lambda name=name, value=value: attrs.evolve(GPU, **{name: value}), name)
            for name in ("price", "worth")
            for value in (0, -1.0, math.nan, math.inf, "1", True)
        ],
        *[
            (lambda most=most: attrs.evolve(GPU, most=most), "most")
            for most in (0, -1, 1.5)
        ],
        (lambda: attrs.evolve(GPU, machine=""), "machine"),
        (lambda: Pools(pools={}), "no pools"),
        (lambda: Pools(pools={"a": Pool(policy=Told())}, budget=math.nan), "budget"),
    ],
)
def test_offers_and_budgets_that_make_no_sense_are_refused(make, why):
    with pytest.raises(InvalidPolicy, match=why):
        make()


def test_decimals_buy_what_they_are_worth():
    tenth = Offer(machine="tenth", price=0.1, worth=0.3)
    scaler = Cheapest(policy=Told(), offers=(tenth,), budget=0.3)
    assert scaler.plan(0.9) == {"tenth": 3}


OFFERS = st.builds(
    dict,
    price=st.integers(1, 12),
    worth=st.integers(1, 8),
    most=st.integers(1, 3),
)


@given(
    st.lists(OFFERS, min_size=1, max_size=3),
    st.integers(0, 30),
    st.integers(0, 60) | st.just(math.inf),
)
def test_greedy_is_within_a_machine_of_the_best(rows, wish, budget):
    offers = tuple(
        Offer(machine=f"m{row}", **fields) for row, fields in enumerate(rows)
    )
    plan = Cheapest(policy=Told(), offers=offers, budget=budget).plan(wish)
    bought = [plan[offer.machine] for offer in offers]

    def total(counts, field):
        pairs = zip(counts, offers, strict=True)
        return sum(count * getattr(offer, field) for count, offer in pairs)

    baskets = list(itertools.product(*[range(offer.most + 1) for offer in offers]))
    paid = [counts for counts in baskets if total(counts, "price") <= budget]
    assert tuple(bought) in paid
    if total(bought, "worth") >= wish:
        least = min(total(c, "price") for c in paid if total(c, "worth") >= wish)
        dearest = max(offer.price for offer in offers)
        assert total(bought, "price") < least + dearest
    else:
        best = max(total(counts, "worth") for counts in paid)
        assert min(best, wish) < total(bought, "worth") + max(o.worth for o in offers)


# HPA in process -------------------------------------------------------------


def test_an_hpa_follows_the_workers_of_a_fleet(make_bench):
    metric = Pods("vllm:num_requests_running", AverageValue(5))
    scaler = Hpa(spec=HpaSpec(max_replicas=4, metrics=(metric,)))
    bench = make_bench(1)
    bench.load(20)
    assert scaler.target(bench.view) == 4
    for _ in range(3):
        bench.join(State.WARMING)
    bench.wait(15.0)
    assert scaler.target(bench.view) == 4  # starting ones are pending, not idle
    bench.load(0)
    for name in bench.there:
        bench.change(name, State.READY)
    counts = []
    for _ in range(30):
        bench.wait(15.0)
        counts.append(scaler.target(bench.view))
    assert counts[0] == 4
    assert counts[-1] == 1
    assert sorted(counts, reverse=True) == counts


def test_an_hpa_looks_only_every_so_often(make_bench):
    metric = Pods("vllm_num_requests_running", AverageValue(5))
    scaler = Hpa(spec=HpaSpec(max_replicas=4, metrics=(metric,)))
    bench = make_bench(1)
    assert scaler.target(bench.view) == 1
    bench.load(20)
    bench.wait(14.0)
    assert scaler.target(bench.view) == 1
    bench.wait(1.0)
    assert scaler.target(bench.view) == 4


def test_a_quantile_ignores_what_few_requests_saw(make_bench):
    bench, inner = make_bench(1), Told()
    scaler = Quantile(policy=inner, part=0.9, window=100.0, max_workers=99)

    def see(wish, arrivals):
        inner.wish = wish
        bench.wait(1.0)
        bench.arrive(arrivals)
        return scaler.wanted(bench.view)

    assert see(3, 90) == 3
    assert see(50, 9) == 3  # 9 of 99 requests saw it
    assert see(50, 9) == 50  # 18 of 108
    bench.wait(99.5)
    assert see(2, 100) == 2  # all that is long ago
    assert see(1, 0) == 2


def test_latency_leaves_places_in_the_batches():
    slo = LatencySlo(ttft=60.0, itl=60.0, fill=0.5, max_workers=64)
    assert slo.fewest(Load(80, 8000, 0, 10, 100, max_running=16)) == 10
    assert slo.fewest(Load(80, 8000, 0, 10, 100)) == 1


def test_old_prompts_can_be_left_out():
    load = Load(10, 10_000, 400_000, 1000, 1000)
    known = {"ttft": 1.0, "itl": 1.0, "max_workers": 64}
    assert LatencySlo(**known).fewest(load) > 3
    assert LatencySlo(**known, backlog=False).fewest(load) == 1
