"""Several kinds of workers, within one budget, of workers or of money."""

import itertools
import math

import attrs
import hypothesis.strategies as st
import pytest
from hypothesis import given

from llmd import commands as c
from llmd import events as e
from llmd.autoscaler import (
    Autoscaler,
    Cheapest,
    Offer,
    Pool,
    Pools,
)
from llmd.errors import InvalidPolicy
from llmd.types import Role


class Told(Autoscaler):
    wish = 1.0

    def wanted(self, view):
        return self.wish


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
