"""Parts that meet: lanes, models, replaced balancers, hooks that raise half way."""

import copy

import attrs
import numpy as np
import pytest

import llmd
from llmd import balancer as b
from llmd import commands as c
from llmd import events as e
from llmd.errors import PolicyError
from llmd.sim import Job, Simulator, Workload, fleet


def worker(id, **facts):
    return llmd.Worker(id=id, **{"max_running": 1, **facts})


def asked(id, prompt=10, **fields):
    return llmd.Request(id=id, prompt=range(prompt), salt=id, **fields)


class Cluster:
    """A cluster that notes what became of whom."""

    def __init__(self, balancer, *workers):
        self.cluster, self.now = llmd.Cluster(balancer=balancer), 0.0
        self.where, self.sent, self.failed, self.shed = {}, [], {}, []
        for each in workers:
            self.feed(e.WorkerJoined(0.0, each))

    def feed(self, event):
        for command in self.cluster.handle(event):
            match command:
                case c.Dispatch(request=request, decision=decision):
                    self.where[request.id] = decision.decode
                    self.sent.append(request.id)
                case c.Fail(request=request, error=error):
                    self.failed[request.id] = error
                    self.where.pop(request.id, None)
                case c.Requeue(request=request):
                    self.shed.append(request.id)
                    self.where.pop(request.id, None)

    def arrive(self, id, prompt=10, **fields):
        self.feed(e.RequestArrived(self.now, asked(id, prompt, **fields)))

    def end(self, id):
        self.feed(e.RequestEnded(self.now, self.where.pop(id), id))

    def tick(self, seconds=0.0):
        self.now += seconds
        self.feed(e.Tick(self.now))

    @property
    def waiting(self):
        return [request.id for request in self.cluster.view.waiting]


def flood(fleet, model="m", rounds=60, **late):
    """Serve a chat flood of *model*, in which one *late* batch request waits."""
    for number in range(rounds):
        fleet.arrive(f"chat{number}", model=model)
        if number == 3:
            fleet.arrive("late", priority=1, **late)
        fleet.tick(0.05)
        for id in [id for id in fleet.where if id.startswith("chat")]:
            fleet.end(id)
    return fleet.sent


def ageing(*more, every=4):
    return b.Bands([b.Band(), b.Band(max_wait=1.0), *more], every=every)


@pytest.mark.parametrize(
    "late", [{"model": "alias"}, {"model": ""}, {"model": "m", "lora": "x"}], ids=str
)
def test_every_name_of_a_worker_has_its_turn(late):
    serves = worker("w", models={"m", "alias"}, loras={"x"})
    sent = flood(Cluster(ageing(), serves), **late)
    assert "late" in sent
    # A second, and four dispatches of the flood of one in 0.05 s.
    assert sent.index("late") <= 3 + 20 + 5


def test_an_overdue_request_too_long_for_who_is_free_takes_nobodys_turn():
    small = worker("small", max_model_tokens=100, models={"m"})
    fleet = Cluster(ageing(), small, worker("big", models={"m"}))
    fleet.arrive("long", 400, model="m")
    fleet.arrive("too long", 500, priority=1, model="m")
    assert "late" in flood(fleet, model="m")
    assert "too long" in fleet.waiting


class Apart(b.Room):
    """Never lets one tenant in, which has a lane of its own."""

    def lane(self, request, view):
        return request.tenant

    def open(self, request, share, view):
        return np.full(len(view.workers), request.tenant != "x")


def test_an_overdue_request_that_a_room_keeps_out_takes_nobodys_turn():
    fleet = Cluster(b.FlowControl(ageing(), rooms=[Apart()]), worker("w"))
    fleet.arrive("kept out", priority=1, tenant="x")
    assert "late" in flood(fleet, model="")


def test_an_overdue_request_waits_while_its_worker_sleeps():
    flow = b.FlowControl(ageing(every=1), rooms=[b.FixedRoom(requests=4)])
    fleet = Cluster(flow, worker("w", state=llmd.State.SLEEPING))
    fleet.arrive("batch", priority=1)
    fleet.tick(2.0)
    assert fleet.waiting == ["batch"]
    fleet.feed(e.WorkerChanged(2.0, "w", state=llmd.State.READY))
    assert fleet.sent == ["batch"]


@pytest.mark.parametrize("when", [0.5, 2.0])
def test_a_gate_added_at_run_time_loses_nobody(when):
    flow = b.FlowControl(ageing(every=2))
    fleet = Cluster(flow, worker("w"))
    fleet.arrive("running")
    for number in range(3):
        fleet.arrive(f"batch{number}", priority=1)
    fleet.tick(when)
    fleet.cluster.balancer = attrs.evolve(flow, gates=[b.QueueFull(requests=50)])
    fleet.end("running")
    for number in range(60):
        fleet.arrive(f"chat{number}")
        fleet.tick(0.1)
        for id in [*fleet.where]:
            fleet.end(id)
    assert {"batch0", "batch1", "batch2"} <= {*fleet.sent}


def test_relatives_outlive_a_replaced_balancer():
    dlpm = b.Dlpm()
    fleet = Cluster(b.FlowControl(dlpm), worker("w", max_running=1))
    for number in range(5):
        fleet.arrive(f"r{number}", 64)
    fleet.cluster.balancer = b.FlowControl(dlpm, gates=[b.QueueFull()])
    assert len(dlpm._relatives) == 4
    while fleet.where:
        fleet.end(next(iter(fleet.where)))
    assert len(dlpm._relatives) == 0
    assert not dlpm.ledger._waiting


class Nth(b.Room):
    """Room for so many tokens; raises when it is asked for the nth time."""

    def __init__(self):
        self.asked, self.fatal = 0, None

    def open(self, request, share, view):
        self.asked += 1
        if self.asked == self.fatal:
            raise ValueError("nth")
        return view.workers.context_tokens + request.prompt_tokens <= 40


@pytest.mark.parametrize("nth", range(1, 12))
def test_a_room_that_raises_while_others_make_place_loses_nobody(nth):
    room = Nth()
    flow = b.FlowControl(b.Bands([b.Fcfs(), b.Fcfs()]), rooms=[room])
    fleet = Cluster(flow, worker("w", max_running=9))
    batch = [f"v{number}" for number in range(4)]
    for id in batch:
        fleet.arrive(id, 10, priority=1, sheddable=True)
    room.asked, room.fatal = 0, nth
    fleet.arrive("urgent", 25)
    running, waiting = {*fleet.where}, {*fleet.waiting}
    assert running == {id for id in [*batch, "urgent"] if id in fleet.cluster.books}
    assert running | waiting | {*fleet.failed} == {*batch, "urgent"}
    assert not running & waiting
    tokens = fleet.cluster.view.workers.context_tokens.sum()
    assert tokens == sum(25 if id == "urgent" else 10 for id in running)


def test_to_try_changes_no_order():
    flow = b.FlowControl(
        b.Bands([b.Fcfs(), b.Fcfs()]), rooms=[b.FixedRoom(kv_usage=1.0)]
    )
    fleet = Cluster(flow, worker("w", max_running=9, kv_blocks=10, block_tokens=10))
    for number in range(3):
        fleet.arrive(f"v{number}", 30, priority=1, sheddable=number > 0)
    before = [booking.request.id for booking in fleet.cluster.books.sheddable("w")]
    assert before == ["v2", "v1"]
    assert fleet.cluster.verdict(asked("u", 60)).outcome == "admit"
    assert fleet.cluster.verdict(asked("u", 300)).outcome == "queue"
    after = [booking.request.id for booking in fleet.cluster.books.sheddable("w")]
    assert after == before


def test_what_made_place_goes_to_a_worker_that_is_free():
    both = worker("a", models={"A", "V"})
    fleet = Cluster(b.Bands([b.Fcfs(), b.Fcfs()]), both, worker("b", models={"V"}))
    fleet.arrive("other", model="V", priority=1)
    fleet.arrive("victim", model="V", priority=1, sheddable=True)
    if fleet.where["victim"] == "b":
        pytest.skip("it runs where nobody wants it")
    fleet.end("other")
    fleet.arrive("urgent", model="A")
    assert fleet.where == {"urgent": "a", "victim": "b"}


def test_what_was_hoped_for_of_the_shed_is_not_counted_as_cached():
    fleet = Cluster(b.Bands([b.Fcfs(), b.Fcfs()]), worker("w"))
    shared = {"prompt": range(160)}
    victim = llmd.Request(id="v", priority=1, sheddable=True, **shared)
    fleet.feed(e.RequestArrived(0.0, victim))
    fleet.feed(e.RequestArrived(0.0, llmd.Request(id="u", **shared)))
    assert fleet.shed == ["v"]
    assert fleet.cluster.books.get("u").uncached_tokens == 160


def test_who_stands_behind_a_cancelled_request_goes_at_once():
    flow = b.FlowControl(rooms=[b.FixedRoom(prefill_tokens=1000)])
    fleet = Cluster(flow, worker("w", max_running=9))
    for id, tokens in (("run", 500), ("big", 5000), ("small", 10)):
        fleet.arrive(id, tokens)
    assert fleet.waiting == ["big", "small"]
    fleet.feed(e.RequestCancelled(0.0, "big"))
    assert fleet.waiting == []


class OfTwoMinds(llmd.QueueBalancer):
    """Keys that do not compare: a number here, a pair there."""

    def key(self, request, view):
        return request.prompt_tokens if request.model == "A" else (1, 2)


def test_keys_that_do_not_compare_halt_nobody():
    fleet = Cluster(OfTwoMinds(), worker("a", models={"A"}), worker("b", models={"B"}))
    for model in "AABB":
        fleet.arrive(f"{model}{len(fleet.sent) + len(fleet.waiting)}", model=model)
    fleet.tick(1.0)
    while fleet.where:
        fleet.end(next(iter(fleet.where)))
    assert len(fleet.sent) == 4
    assert fleet.cluster.waiting.faults


class Fussy(llmd.Fcfs):
    """Cannot place one request once it has been told not to."""

    fussy = False

    def key(self, request, view):
        if self.fussy and request.id == "r2":
            raise ValueError("no place")
        return 0


def test_a_fleet_that_changes_ends_only_whom_the_balancer_fails_on():
    fussy = Fussy()
    fleet = Cluster(fussy, worker("a"))
    for number in range(4):
        fleet.arrive(f"r{number}")
    fussy.fussy = True
    fleet.feed(e.WorkerJoined(0.0, worker("b", max_model_tokens=77)))
    assert isinstance(fleet.failed.pop("r2"), PolicyError)
    assert not fleet.failed
    assert {*fleet.where} == {"r0", "r1"}


class Counting(llmd.Fcfs):
    """Counts who waits, and refuses to place one of them."""

    waiting = 0

    def key(self, request, view):
        if request.id == "r3":
            raise ValueError("no place")
        return 0

    def queued(self, request, view):
        self.waiting += 1

    def unqueued(self, request, view):
        self.waiting -= 1


def test_a_balancer_that_was_not_taken_has_nobody_waiting():
    fleet = Cluster(llmd.Fcfs(), worker("a"))
    for number in range(5):
        fleet.arrive(f"r{number}")
    counting = Counting()
    with pytest.raises(PolicyError):
        fleet.cluster.balancer = counting
    assert counting.waiting == 0
    assert fleet.waiting == ["r1", "r2", "r3", "r4"]


def test_a_tenant_with_a_request_parked_saves_nothing_up():
    vtc = b.Vtc(output_weight=0.0)
    fleet = Cluster(vtc, worker("w", models={"B"}))
    fleet.feed(e.ModelAdded(0.0, "A"))  # no worker yet
    fleet.arrive("parked", model="A", tenant="t")
    for number in range(50):
        fleet.arrive(f"v{number}", 100, model="B", tenant="v")
        fleet.end(f"v{number}")
    for number in range(10):
        fleet.arrive(f"v+{number}", 100, model="B", tenant="v")
        fleet.arrive(f"t{number}", 100, model="B", tenant="t")
    fleet.sent.clear()
    for _ in range(10):
        fleet.end(next(iter(fleet.where)))
    assert 4 <= sum(id.startswith("t") for id in fleet.sent) <= 6


def test_d2lpm_takes_a_new_worker_for_level_with_the_least_used():
    order = b.D2lpm(worker_quantum=100.0, output_weight=0.0)
    fleet = Cluster(
        order,
        worker("a", models={"A"}, max_running=99),
        worker("z", models={"B"}, max_running=99),
    )
    for number in range(100):
        fleet.arrive(f"r{number}", 100, model="A", tenant="t")
        fleet.end(f"r{number}")
    fleet.feed(e.WorkerJoined(0.0, worker("a2", models={"A"}, max_running=99)))
    where = []
    for number in range(40):
        fleet.arrive(f"s{number}", 100, model="A", tenant="t")
        where.append(fleet.where[f"s{number}"])
    assert 15 <= where.count("a") <= 25


@pytest.mark.parametrize(
    "order", [b.Edf(), b.ShortestPrefill(), b.Vtc(), b.Bands([b.Vtc()])], ids=str
)
def test_a_deadline_is_judged_by_the_order_that_will_serve_it(order):
    flow = b.FlowControl(order, gates=[b.DeadlineInfeasible()])
    fleet = Cluster(flow, worker("w"))
    for number in range(300):
        fleet.arrive(f"bulk{number}", 2000, tenant="bulk")
    fleet.arrive("urgent", 100, tenant="calm", deadline=5.0)
    assert "urgent" not in fleet.failed


def test_a_balancer_whose_times_raise_halts_nobody():
    class Wrong(b.PromptBudget):
        def opens_at(self, view, after):
            raise ValueError("what time is it")

    fleet = Cluster(b.FlowControl(rooms=[Wrong()]), worker("w"))
    fleet.arrive("r1")
    fleet.arrive("r2")
    fleet.end("r1")
    assert fleet.sent == ["r1", "r2"]


def jobs(*of):
    made = []
    for id, at, tokens, model in of:
        request = asked(id, tokens, model=model)
        made.append(Job(request=request, output_tokens=1, at=at))
    return Workload(name="made here", jobs=made)


def test_a_time_long_past_hides_none_to_come():
    room = b.PromptBudget(tokens=100, window_s=1.0)
    simulator = Simulator(llmd.Cluster(balancer=b.FlowControl(rooms=[room])))
    workers = [
        attrs.evolve(each, models=frozenset({model}))
        for each, model in zip(fleet(2), "AB", strict=True)
    ]
    work = jobs(("a", 0.0, 110, "A"), ("b", 0.0, 1000, "B"), ("b+", 0.0, 10, "B"))
    report = simulator.run(work, workers, until=1000.0)
    assert report.completed == 3
    assert max(report.dispatched) == pytest.approx(9.0, abs=0.01)


def test_a_copy_is_whole():
    fleet = Cluster(b.Vtc(), worker("w", max_running=9))
    fleet.arrive("r")
    twin = copy.deepcopy(fleet.cluster)
    twin.handle(e.RequestArrived(0.0, asked("s")))
    assert twin.view.workers.running_requests.tolist() == [2]
    assert fleet.cluster.view.workers.running_requests.tolist() == [1]


def test_a_fair_order_takes_no_bands_however_wrapped():
    with pytest.raises(PolicyError, match="inside"):
        b.Vtc(b.FlowControl(b.Bands([b.Fcfs()])))


def test_whole_parts_are_whole_whatever_floats_make_of_them():
    order = b.Bands([b.Band(ceiling=0.55)])
    fleet = Cluster(order, worker("w", max_running=100))
    for number in range(100):
        fleet.arrive(f"r{number}")
    assert len(fleet.where) == 55


@pytest.mark.parametrize("workers", [1, 2])
def test_younger_overdue_requests_do_not_starve_an_older_one(workers):
    cap = b.LongPrefillCap(long_tokens=2000, of=lambda request: request.priority > 0)
    bands = b.Bands([b.Band(), b.Band(max_wait=1.0)], every=8)
    flow = b.FlowControl(bands, rooms=[b.FixedRoom(prefill_tokens=2048), cap])
    names = [f"w{number}" for number in range(workers)]
    fleet = Cluster(flow, *[worker(name, max_running=64) for name in names])
    fleet.arrive("first", 900)
    fleet.arrive("second", 900)
    fleet.arrive("long", 6000, priority=1)
    began, count = {}, 0
    for _ in range(120):
        for kind, priority in (("chat", 0), ("short", 1)):
            while sum(id.startswith(kind) for id in fleet.waiting) < 5:
                count += 1
                fleet.arrive(f"{kind}{count}", 900, priority=priority)
        fleet.tick(0.05)
        for id in [*fleet.where]:
            if fleet.now - began.setdefault(id, fleet.now) >= 0.1:
                fleet.end(id)
    # After a second, one turn of eight and the drain of its worker.
    assert "long" in fleet.sent[: 40 * workers + 20]


def test_an_older_request_keeps_its_claim_while_its_worker_is_busy():
    bands = b.Bands([b.Band(), b.Band(max_wait=1.0)], every=4)
    fleet = Cluster(bands, worker("w0", models={"A"}), worker("w1", models={"A", "B"}))
    fleet.arrive("run0", model="A")
    fleet.arrive("run1", model="A")
    fleet.arrive("of B", model="B", priority=1)
    fleet.tick(0.1)
    count = 0
    for step in range(60):
        for kind, priority in (("chat", 0), ("late", 1)):
            while sum(id.startswith(kind) for id in fleet.waiting) < 5:
                count += 1
                fleet.arrive(f"{kind}{count}", model="A", priority=priority)
        fleet.tick(0.05)
        # The two workers end in turn, w1 out of step with the turns of the overdue.
        on = ("w0", "w1")[step % 2]
        for id in [id for id, where in fleet.where.items() if where == on]:
            fleet.end(id)
    assert "of B" in fleet.sent
    assert fleet.sent.index("of B") < 40


def test_a_worker_is_not_closed_to_those_who_are_not_in_the_way():
    cap = b.LongPrefillCap(
        long_tokens=2000, spare=0.5, of=lambda request: request.priority > 0
    )
    bands = b.Bands([b.Band(), b.Band(max_wait=1.0)], every=4)
    flow = b.FlowControl(bands, rooms=[cap])
    fleet = Cluster(flow, *[worker(f"w{n}", max_running=8) for n in range(2)])
    fleet.arrive("long1", 6000, priority=1)
    fleet.arrive("long2", 6000, priority=1)
    for number in range(6):
        fleet.arrive(f"chat{number}")
    fleet.tick(2.0)
    for number in range(6, 14):
        fleet.arrive(f"chat{number}")
    # One long prompt at a time there, whatever chat does: its places are free.
    assert fleet.cluster.view.workers.running_requests.sum() == 15
    fleet.end("long1")
    assert "long2" in fleet.where


def test_tenants_of_one_adapter_are_level_with_each_other_only():
    one, many = {"loras": {"x"}}, {"loras": {"y"}, "max_running": 8}
    fleet = Cluster(b.Vtc(output_weight=0.0), worker("x", **one), worker("y", **many))
    for number in range(3):  # a waits all the time, so nothing lifts it
        fleet.arrive(f"a-{number}", 100, lora="x", tenant="a")
    for number in range(400):
        fleet.arrive(f"b{number}", 100, lora="y", tenant="b")
        if number % 8 == 0:
            fleet.arrive(f"a{number}", 100, lora="x", tenant="a")
            for id in [*fleet.where]:
                fleet.end(id)
    for number in range(10):
        fleet.arrive(f"a+{number}", 100, lora="x", tenant="a")
    fleet.arrive("b last", 100, lora="y", tenant="b")
    for number in range(10):
        fleet.arrive(f"c{number}", 100, lora="x", tenant="c")
    fleet.sent.clear()
    for _ in range(10):
        fleet.end(next(id for id, where in fleet.where.items() if where == "x"))
    assert 4 <= sum(id.startswith("c") for id in fleet.sent) <= 6


def test_a_limit_recovers_under_a_ceiling(shop):
    aimd = b.AimdRoom(itl_s=0.05, start=10, samples=4, window_s=0.5)
    bands = b.Bands([b.Band(name="batch", ceiling=0.8)])
    sim = shop(b.FlowControl(bands, rooms=[aimd]), places=400)

    def run(itl_s, seconds):
        began = {}
        for _ in range(round(seconds / itl_s)):
            while len(sim.waiting) < 5:
                sim.arrive()
            sim.now += itl_s
            for id in [*sim.where]:
                sim.token(id)
                if sim.now - began.setdefault(id, sim.now) > 2.0:
                    sim.end(id)
        return aimd.limit("w0")

    slow = run(0.1, 10.0)
    assert slow < 5
    # One more in each window, though 0.8 of the limit is all that is ever filled.
    assert run(0.02, 10.0) >= slow + 10


def test_a_prompt_that_waits_for_who_holds_it_holds_no_short_one_up():
    cap = b.LongPrefillCap(long_tokens=1000)
    flow = b.FlowControl(rooms=[cap])
    fleet = Cluster(flow, worker("a", max_running=4), worker("b", max_running=1))
    turn = llmd.Request(id="turn1", prompt=range(2000))
    fleet.feed(e.BlocksStored(0.0, "b", turn.hashes(16), 16))
    fleet.feed(e.RequestArrived(0.0, turn))
    fleet.arrive("other long", 2000)
    assert fleet.where == {"turn1": "b", "other long": "a"}
    again = llmd.Request(id="turn2", prompt=[*range(2000), 7])
    fleet.feed(e.RequestArrived(0.0, again))
    fleet.arrive("short", 10)
    assert fleet.waiting == ["turn2"]
    assert fleet.where["short"] == "a"


def test_the_least_urgent_makes_place_first():
    bands = b.Bands([b.Band() for _ in range(3)])
    fleet = Cluster(bands, worker("w", max_running=2))
    fleet.arrive("batch", priority=2, sheddable=True)
    fleet.arrive("standard", priority=1, sheddable=True)
    fleet.arrive("chat")
    assert fleet.shed == ["batch"]
    assert {*fleet.where} == {"standard", "chat"}


def test_who_is_chosen_by_a_dispatch_of_another_lane_goes_at_once():
    bands = b.Bands([b.Band(), b.Band(ceiling=0.5, max_wait=1.0)], every=2)
    fleet = Cluster(bands, worker("w", models={"A", "B"}, max_running=4))
    for number in range(3):
        fleet.arrive(f"batch{number}", model="B", priority=1)
    fleet.tick(1.5)
    fleet.arrive("chat", model="A")
    assert fleet.waiting == []


def test_waiting_tenants_are_counted_by_model_and_forgotten():
    vtc = b.Vtc()
    fleet = Cluster(vtc, worker("a", models={"A"}), worker("b", models={"B"}))
    for model in "AB":
        for number in range(4):
            fleet.arrive(f"{model}{number}", model=model, tenant=f"t{number % 3}")
    counts = vtc._backlog.tenants
    assert [counts(of) for of in ({"A"}, {"B"}, {"A", "B"}, {"C"})] == [3, 3, 6, 0]
    assert counts(None) == 3
    while fleet.where:
        fleet.end(next(iter(fleet.where)))
    assert counts(None) == counts({"A", "B"}) == 0
    assert not vtc._backlog._of_model
