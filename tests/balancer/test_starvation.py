"""Nobody waits for a turn that others hold up, or idles a worker for ever."""

import numpy as np
import pytest

import llmd
from llmd import balancer as b
from llmd import commands as c
from llmd import events as e


class Fleet:
    """Workers of several models whose requests run for as long as they are told."""

    def __init__(self, balancer, **workers):
        self.cluster, self.now = llmd.Cluster(balancer=balancer), 0.0
        self.sent, self.failed, self.ends = {}, {}, {}
        for id, facts in workers.items():
            self.handle(e.WorkerJoined(0.0, llmd.Worker(id=id, **facts)))

    def handle(self, event):
        for command in self.cluster.handle(event):
            if isinstance(command, c.Dispatch):
                id = command.request.id
                self.sent[id] = (self.now, command.decision.decode)
                self.ends[id] = self.now + self.lasts(command.request)
            elif isinstance(command, c.Fail):
                self.failed[command.request.id] = command.error

    def lasts(self, request):
        return 0.5 if request.id.startswith("long") else 0.05

    def arrive(self, id, prompt=10, **fields):
        request = llmd.Request(id=id, prompt=range(prompt), salt=id, **fields)
        self.handle(e.RequestArrived(self.now, request))

    def step(self, seconds=0.01):
        """Let time pass, and end what is done by then."""
        self.now = round(self.now + seconds, 6)
        for id in [id for id, at in self.ends.items() if at <= self.now]:
            del self.ends[id]
            self.handle(e.RequestEnded(self.now, self.sent[id][1], id))
        self.handle(e.Tick(self.now))


@pytest.mark.parametrize("spare", [0.0, 0.5])
def test_no_worker_is_kept_that_never_takes_who_presses(spare):
    cap = b.LongPrefillCap(long_tokens=2000, spare=spare)
    bands = b.Bands([b.Band(name="chat"), b.Band(name="batch", max_wait=2.0)])
    flow = b.FlowControl(bands, rooms=[b.FixedRoom(prefill_tokens=2048), cap])
    fleet = Fleet(flow, a={"max_running": 64}, b={"max_running": 64})
    for number in range(600):
        fleet.arrive(f"chat{number}", 900)
        if number == 100:
            fleet.arrive("long", 6000, priority=1)
        fleet.step()
    at, _ = fleet.sent["long"]
    assert at <= 4.0
    chosen = [to for id, (at, to) in fleet.sent.items() if at > 5.0]
    assert {"a", "b"} == set(chosen)  # neither idles once it is gone


class NotFor(b.Room):
    """Never opens for one tenant, and says nothing of that beforehand."""

    def open(self, request, share, view):
        return np.full(len(view.workers), request.tenant != "x")

    def lane(self, request, view):
        return request.tenant


def test_a_room_that_never_opens_keeps_no_worker_from_others(shop):
    flow = b.FlowControl(b.Bands([b.Band(max_wait=1.0)], every=1), rooms=[NotFor()])
    sim = shop(flow, places=2)
    sim.arrive("x", id="hopeless")
    sim.arrive("a")
    sim.wait(2.0)
    sim.wait(0.1)
    sim.drain()
    for _ in range(3):
        sim.arrive("a")
    sim.wait(0.1)
    assert sim.waiting == ["hopeless", *sim.waiting[1:]]
    assert len(sim.where) == 2


@pytest.mark.parametrize("gone", [True, False])
def test_an_overdue_request_without_a_worker_takes_nobodys_turn(gone):
    bands = b.Bands([b.Band(), b.Band(max_wait=1.0)], every=4)
    one = {"max_running": 1}
    fleet = Fleet(bands, a={"models": {"A"}, **one}, b={"models": {"B"}, **one})
    fleet.arrive("long of A", model="A")
    fleet.ends["long of A"] = 1e9
    fleet.arrive("waits for A", model="A", priority=1)
    if gone:
        fleet.handle(e.ModelAdded(0.0, "A"))  # its requests wait for a worker
        fleet.handle(e.WorkerLeft(0.0, "a"))
    for number in range(300):
        fleet.arrive(f"chat{number}", model="B")
        if number == 10:
            fleet.arrive("batch of B", model="B", priority=1)
        fleet.step(0.02)
    assert "waits for A" not in fleet.sent
    # Overdue after a second, and then at most four requests of 0.05 s later.
    assert fleet.sent["batch of B"][0] <= 0.2 + 1.0 + 4 * 0.06 + 0.02


def test_hold_back_lasts_however_old_a_backlog_is(shop):
    order = b.Bands([b.Band(), b.Band(ceiling=0.5, max_wait=1.0)], every=8)
    sim = shop(order, places=10)
    for _ in range(100):
        sim.arrive(priority=1)
    assert len(sim.where) == 5
    sim.wait(2.0)
    # One dispatch in eight may go beyond, so that nobody waits for ever.
    assert len(sim.where) <= 6
    for _ in range(30):
        sim.end(next(iter(sim.where)))
    assert len(sim.where) <= 9
    sim.arrive(id="chat")
    assert "chat" in sim.sent


def test_an_overdue_request_that_was_shed_is_still_overdue(shop):
    bands = b.Bands([b.Band(), b.Band(max_wait=1.0)], every=1)
    sim = shop(bands, places=1, workers=1)
    sim.arrive(priority=1, id="batch")
    sim.feed(e.RequestEnded(2.0, "w0", "batch", "the engine failed"))
    sim.now = 2.0
    assert sim.sent == ["batch", "batch"]
    sim.arrive(id="chat")
    sim.feed(e.RequestEnded(2.0, "w0", "batch", "again"))
    # It is its turn, before a higher band's.
    assert sim.sent == ["batch", "batch", "batch"]


def test_work_lost_with_its_worker_stands_where_it_stood(shop):
    sim = shop(b.Fcfs(), places=4)
    for number in range(5):
        sim.arrive(id=f"r{number}")
    sim.feed(e.WorkerLeft(0.0, "w0"))
    sim.where.clear()
    sim.sent.clear()
    sim.feed(e.WorkerJoined(0.0, llmd.Worker(id="w1", max_running=1)))
    assert sim.drain() == [f"r{number}" for number in range(5)]


def test_a_flood_of_one_band_fills_that_band_only(shop):
    order = b.Bands([b.Vtc(b.Fcfs(max_waiting=20)), b.Fcfs(max_waiting=20)])
    sim = shop(order, places=1)
    for _ in range(50):
        sim.arrive(priority=1)
    assert len(sim.waiting) == 20
    sim.arrive(id="chat")
    assert "chat" not in sim.failed


def test_a_tenant_nobody_can_serve_does_not_hold_the_level_down():
    vtc = b.Vtc(output_weight=0.0)
    fleet = Fleet(vtc, a={"models": {"A"}, "max_running": 1})
    fleet.handle(e.ModelAdded(0.0, "none"))
    fleet.arrive("stuck", model="none", tenant="stuck")
    for number in range(50):
        fleet.arrive(f"a{number}", 100, model="A", tenant="a")
        fleet.step(0.06)
    for number in range(20):
        fleet.arrive(f"a+{number}", 100, model="A", tenant="a")
        fleet.arrive(f"new{number}", 100, model="A", tenant="new")
    for _ in range(11):
        fleet.step(0.06)
    last = [id[0] for id in [*fleet.sent][-10:]]
    assert 4 <= last.count("n") <= 6


def test_places_are_made_for_a_request_that_needs_more_than_one(shop):
    bands = b.Bands([b.Band(), b.Band()])
    flow = b.FlowControl(bands, rooms=[b.FixedRoom(kv_usage=1.0)])
    sim = shop(flow, places=9, kv_blocks=100, block_tokens=16)
    for id in ("old", "new"):
        sim.arrive(prompt=800, id=id, priority=1, sheddable=True)
    asked = llmd.Request(id="chat", prompt=range(1500))
    assert sim.cluster.verdict(asked).outcome == "admit"
    assert [*sim.where] == ["old", "new"]  # to ask changes nothing
    sim.arrive(prompt=1500, id="chat")
    assert sim.sent[-1] == "chat"
    assert sim.shed == ["new", "old"]
    assert sim.waiting == ["old", "new"]


def test_no_more_is_shed_than_has_to_be(shop):
    bands = b.Bands([b.Band(), b.Band()])
    cap = b.LongPrefillCap(long_tokens=1000)
    sim = shop(b.FlowControl(bands, rooms=[cap]), places=9)
    sim.arrive(prompt=2000, id="long", priority=1, sheddable=True)
    sim.arrive(prompt=10, id="short", priority=1, sheddable=True)
    sim.arrive(prompt=2000, id="chat")  # one long prompt at a time
    assert sim.sent[-1] == "chat"
    assert sim.shed == ["long"]
    assert [*sim.where] == ["short", "chat"]
