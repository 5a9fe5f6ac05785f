"""The queue itself: replacing policies, cancels, deadlines, faults."""

import random

import attrs
import pytest

import llmd
from llmd import balancer as b
from llmd import events as e
from llmd.errors import DeadlineExceeded, PolicyError


def test_a_new_balancer_keeps_all_that_waits(shop):
    sim = shop(b.Fcfs(), places=1)
    running = sim.arrive("a", 10)
    for tokens in (30, 10, 20):
        sim.arrive("a", tokens, id=f"{tokens}")
    sim.cluster.balancer = b.ShortestPrefill()
    assert sorted(sim.waiting) == ["10", "20", "30"]
    sim.end(running)
    sim.cluster.balancer = b.Bands([b.Vtc(), b.Vtc()])
    assert sim.drain() == ["10", "30", "20"]


def test_a_balancer_that_fails_does_not_take_over(shop):
    class Broken(b.Fcfs):
        def key(self, request, view):
            return {}[request.id]

    sim = shop(b.Fcfs(), places=1)
    old = sim.cluster.balancer
    for _ in range(3):
        sim.arrive()
    with pytest.raises(PolicyError):
        sim.cluster.balancer = Broken()
    assert sim.cluster.balancer is old
    assert len(sim.drain()) == 3


def test_a_balancer_that_comes_back_has_forgotten_who_waited(shop):
    vtc, other = b.Vtc(), b.Fcfs()
    sim = shop(vtc, places=1)
    for tenant in "aab":
        sim.arrive(tenant)
    for balancer in (other, vtc, other, vtc):
        sim.cluster.balancer = balancer
    assert vtc.ledger.waiting("a") == 1
    sim.drain()
    assert vtc.ledger.waiting("a") == vtc.ledger.waiting("b") == 0


def test_lanes_do_not_hold_each_other_up(shop):
    sim = shop(b.Fcfs(), places=1, models=("a",))
    sim.feed(e.WorkerJoined(0.0, llmd.Worker(id="v", models=("b",), max_running=1)))
    sim.arrive(model="a")
    sim.arrive(model="a", id="blocked")
    sim.arrive(model="b", id="goes")
    assert "goes" in sim.sent
    assert sim.waiting == ["blocked"]


def test_one_order_holds_over_models_that_share_workers(shop):
    sim = shop(b.Fcfs(), places=1, models=("a", "b"))
    running = sim.arrive(model="a")
    sim.arrive(model="a", priority=2, id="later")
    sim.arrive(model="b", priority=1, id="first")
    sim.end(running)
    assert sim.drain() == ["first", "later"]


def test_a_long_request_waits_for_a_long_worker_and_others_pass(shop):
    sim = shop(b.Fcfs(), places=1, max_model_tokens=100)
    sim.feed(
        e.WorkerJoined(0.0, llmd.Worker(id="v", max_model_tokens=900, max_running=1))
    )
    sim.arrive(prompt=500)
    sim.arrive(prompt=500, id="long")
    sim.arrive(prompt=50, id="short")
    assert sim.where["short"] == "w0"
    assert sim.waiting == ["long"]


@pytest.mark.parametrize("hook", ["turn", "place", "queued", "moved", "unqueued"])
def test_a_hook_that_fails_costs_one_request_at_most(shop, hook):
    class Fragile(b.Vtc):
        broken = False

    def fail(self, *args):
        if type(self).broken and (hook != "turn" or args[0] == "bad"):
            raise RuntimeError("oops")
        return getattr(b.Vtc, hook)(self, *args)

    setattr(Fragile, hook, fail)
    sim = shop(Fragile(), places=1)
    running = sim.arrive("good")
    sim.arrive("bad", id="bad")
    Fragile.broken = True
    tried = sim.arrive("bad", id="tried")
    Fragile.broken = hook == "turn"
    assert all(isinstance(error, PolicyError) for error in sim.failed.values())
    assert sim.failed.keys() <= {"bad", tried}
    sim.end(running)
    Fragile.broken = False
    after = sim.arrive("good")
    assert after in sim.drain()
    assert not sim.waiting


def test_turns_that_are_no_numbers_fail_what_they_were_for(shop):
    class Nan(b.Fcfs):
        def turn(self, flow, view):
            return float("nan")

    sim = shop(Nan())
    assert isinstance(sim.failed[sim.arrive()], PolicyError)
    assert not sim.waiting


def test_a_queue_deadline_ends_a_request_with_its_own_error(shop):
    sim = shop(b.Vtc(), places=1)
    sim.arrive("a")
    waits = sim.arrive("a", deadline=2.0)
    sim.wait(1.0)
    assert waits in sim.waiting
    sim.wait(1.0)
    assert isinstance(sim.failed[waits], DeadlineExceeded)
    assert not sim.waiting


def everything():
    of = [
        b.Band(order=b.Vtc(b.Edf()), max_wait=3.0),
        b.Band(order=b.Dlpm(), max_wait=9.0, ceiling=0.5),
    ]
    return b.FlowControl(
        b.Bands(of),
        gates=[b.RateLimit(requests_per_min=1e5), b.QueueFull(requests=500)],
        rooms=[b.FixedRoom(requests=20), b.LongPrefillCap(long_tokens=50)],
    )


def sizes(thing, seen=None):
    """Sum the lengths of all containers that a policy object reaches."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, str | bytes | int | float | type):
        return 0
    seen.add(id(thing))
    total = 0
    if isinstance(thing, dict):
        total = len(thing) + sum(sizes(value, seen) for value in thing.values())
    elif isinstance(thing, tuple | list):
        total = sum(sizes(value, seen) for value in thing)
    elif attrs.has(type(thing)):
        names = [field.name for field in attrs.fields(type(thing))]
        total = sum(sizes(getattr(thing, name), seen) for name in names)
    elif hasattr(thing, "__len__"):
        total = len(thing)
    return total


def test_ten_thousand_random_cancels_leak_nothing(shop):
    rng = random.Random(4)
    balancer = everything()
    sim = shop(balancer, places=20, workers=2)

    def cycle(cancels):
        while cancels:
            act = rng.random()
            if act < 0.5:
                prompt = [*range(rng.choice([16, 48])), rng.randrange(99)]
                sim.arrive(rng.choice("abc"), prompt, priority=rng.randrange(2))
            elif act < 0.6 and sim.where:
                sim.token(rng.choice(list(sim.where)))
            elif act < 0.65:
                sim.wait(rng.random())
            elif known := sim.waiting + list(sim.where):
                sim.cancel(rng.choice(known))
                cancels -= 1
        for id in sim.waiting + list(sim.where):
            sim.cancel(id)

    cycle(10_000)
    cluster = sim.cluster
    assert len(cluster.books) == len(cluster.waiting) == len(cluster.deadlines) == 0
    workers = cluster.view.workers
    for column in (
        workers.running_requests,
        workers.waiting_requests,
        workers.prefill_tokens,
        workers.context_tokens,
    ):
        assert not column.any()
    waiting = cluster.waiting
    assert not waiting.ranks()
    for table in (
        waiting._lanes_of,
        waiting._alarms,
        waiting._models,
        waiting._tokens,
        waiting._touched,
    ):
        assert not len(table)
    assert not waiting.faults
    # Ledgers keep a few dozen lines that are out of date in their heaps.
    assert sizes((balancer.order, *balancer.gates, *balancer.rooms)) < 500
    for band in balancer.order.of:
        assert band.waiting_requests == band.waiting_tokens == 0
    assert all(account.idle for _, account in balancer.accounts.items())
