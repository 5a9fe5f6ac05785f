"""Books that stay right whatever a balancer, an engine or a fleet does."""

import math

import numpy as np
import pytest

import llmd
from llmd import balancer as b
from llmd import commands as c
from llmd import events as e
from llmd.errors import DeadlineExceeded, InvalidEvent, PolicyError


class Shop:
    """A cluster of workers with room for one request each, driven by hand."""

    def __init__(self, balancer, workers=1):
        self.cluster = llmd.Cluster(balancer=balancer)
        self.now, self.sent, self.failed = 0.0, [], {}
        for number in range(workers):
            self.join(f"w{number}")

    def handle(self, event):
        commands = self.cluster.handle(event)
        for command in commands:
            if isinstance(command, c.Dispatch):
                self.sent.append(command.request.id)
            elif isinstance(command, c.Fail):
                self.failed[command.request.id] = command.error
        return commands

    def join(self, id, **facts):
        worker = llmd.Worker(id=id, max_running=1, **facts)
        self.handle(e.WorkerJoined(self.now, worker))

    def arrive(self, id, tenant="t", tokens=3, **options):
        prompt = range(1, tokens + 1)
        request = llmd.Request(id=id, prompt=prompt, tenant=tenant, **options)
        self.handle(e.RequestArrived(self.now, request))

    def end(self, id, error=None):
        booking = self.cluster.books.get(id)
        self.handle(e.RequestEnded(self.now, booking.decision.decode, id, error))

    def tick(self, seconds):
        self.now += seconds
        self.handle(e.Tick(self.now))

    def drain(self):
        while len(self.cluster.books):
            self.end(next(id for id in self.sent if id in self.cluster.books))


def test_a_worker_of_another_size_counts_nobody_twice():
    band, fair = b.Band(max_requests=10), b.Vtc()
    shop = Shop(b.FlowControl(b.Bands([band, b.Band(order=fair)])))
    for number in range(4):
        shop.arrive(f"r{number}")
        shop.arrive(f"s{number}", priority=1)
    for turn in range(3):
        shop.join(f"big{turn}", max_model_tokens=2000 + turn)
        shop.handle(e.WorkerLeft(shop.now, f"big{turn}"))
    waiting = [request.priority for request in shop.cluster.waiting]
    assert band.waiting_requests == waiting.count(0)
    assert fair.ledger.waiting("t") == waiting.count(1)
    shop.cluster.balancer = shop.cluster.balancer
    assert band.waiting_requests == waiting.count(0)
    shop.drain()
    assert band.waiting_requests == fair.ledger.waiting("t") == 0


@pytest.mark.parametrize("fault", ["shed", "lost"])
def test_what_is_sent_again_is_paid_for_once(fault):
    fair = b.Vtc()
    flow = b.FlowControl(b.Bands([b.Band(), b.Band(order=fair)]))
    shop = Shop(flow)
    shop.arrive("x", "X", tokens=1000, priority=1, sheddable=True)
    for number in range(5):
        if fault == "shed":
            shop.arrive(f"chat{number}", "C", tokens=1)
            shop.end(f"chat{number}")
        elif number < 2:
            shop.end("x", error="the engine broke")
    assert shop.sent.count("x") > 2
    assert fair.ledger["X"] == 1000.0
    assert flow.accounts["X"].served_tokens == 1000


def test_an_overdue_request_never_goes_later_than_before():
    bands = b.Bands(
        [b.Band(name="chat", max_wait=1.0), b.Band(name="batch", max_wait=60.0)]
    )
    shop = Shop(bands)
    shop.arrive("running")
    shop.arrive("chat")
    shop.arrive("batch", priority=1)
    shop.tick(1.5)
    shop.end("running")
    assert shop.sent == ["running", "chat"]


def test_one_dispatch_in_every_goes_to_the_longest_overdue_though_others_are_too():
    chat = b.Band(name="chat", max_wait=0.5)
    shop = Shop(b.Bands([chat, b.Band(name="batch", max_wait=1.0)], every=4))
    shop.arrive("running")
    shop.arrive("old", priority=1)
    shop.tick(0.1)
    for number in range(40):
        shop.arrive(f"chat{number}")
    shop.tick(2.0)
    before = len(shop.sent)
    while "old" not in shop.sent:
        shop.end(shop.sent[-1])
    # Chat arrived later but was overdue first: each of it counts one turn at most.
    assert len(shop.sent) - before <= 4 * 41
    order = [id for id in shop.sent if id.startswith("chat")]
    assert order == sorted(order, key=lambda id: int(id[4:]))


class Restless(b.Fcfs):
    @property
    def restless(self):
        raise RuntimeError("no flows today")


class Moves(b.Fcfs):
    def moved(self, view):
        return [["x"]]


@pytest.mark.parametrize("balancer", [Restless(), Moves()])
def test_hooks_that_blame_no_request_are_kept_and_nothing_is_left(balancer):
    shop = Shop(balancer)
    for id in "ab":
        shop.arrive(id)
    shop.drain()
    assert shop.sent == ["a", "b"]
    assert isinstance(shop.cluster.waiting.faults[-1], PolicyError)
    assert not len(shop.cluster.waiting) + len(shop.cluster.books)


class NanKey(b.Fcfs):
    def key(self, request, view):
        return (0, (math.nan if request.tenant == "bad" else 1.0,))


class NanTurn(b.Fcfs):
    def flow(self, request):
        return request.tenant

    def turn(self, flow, view):
        return (math.nan if flow == "bad" else 1.0, 0)


class BadFlow(b.Fcfs):
    def flow(self, request):
        return [] if request.tenant == "bad" else request.tenant


@pytest.mark.parametrize("balancer", [NanKey(), NanTurn(), BadFlow()])
def test_who_has_no_place_fails_and_nobody_else(balancer):
    shop = Shop(balancer)
    shop.arrive("running")
    for number in range(4):
        shop.arrive(f"good{number}", "good")
        shop.arrive(f"bad{number}", "bad")
    assert {*shop.failed} == {f"bad{number}" for number in range(4)}
    assert all(isinstance(error, PolicyError) for error in shop.failed.values())
    shop.drain()
    assert shop.sent == ["running", *[f"good{number}" for number in range(4)]]
    assert not len(shop.cluster.waiting)


def test_a_request_that_waits_alone_and_has_no_place_fails_itself():
    shop = Shop(BadFlow())
    shop.arrive("bad", "bad")
    assert [*shop.failed] == ["bad"]
    assert not len(shop.cluster.waiting)


class Dispatched(b.Fcfs):
    def dispatched(self, booking, view):
        raise ZeroDivisionError


def test_the_balancer_answers_for_its_hooks():
    shop = Shop(Dispatched())
    shop.arrive("a")
    assert "Dispatched" in str(shop.failed["a"])
    assert not len(shop.cluster.books)


@pytest.mark.parametrize("tokens", [-1, 0.5, math.nan, "3", 10**30, None])
def test_an_engine_that_counts_no_tokens_is_refused(tokens):
    shop = Shop(b.Vtc())
    shop.arrive("a")
    shop.handle(e.FirstToken(0.0, "w0", "a"))
    context = int(shop.cluster.view.workers.context_tokens[0])
    with pytest.raises(InvalidEvent):
        shop.handle(e.TokensGenerated(0.0, "w0", "a", tokens))
    assert int(shop.cluster.view.workers.context_tokens[0]) == context


@pytest.mark.parametrize("full", [{"prefill_tokens": 2048}, {"kv_usage": 0.5}])
def test_a_long_prompt_comes_to_its_turn_though_short_ones_never_pause(full):
    rooms = [b.FixedRoom(**full), b.LongPrefillCap(long_tokens=2000)]
    bands = b.Bands([b.Band(), b.Band(max_wait=2.0)])
    cluster = llmd.Cluster(balancer=b.FlowControl(bands, rooms=rooms))
    worker = llmd.Worker(id="w", max_running=64, kv_blocks=600, block_tokens=16)
    cluster.handle(e.WorkerJoined(0.0, worker))
    running, sent_at = [], {}

    def handle(event):
        for command in cluster.handle(event):
            if isinstance(command, c.Dispatch):
                sent_at[command.request.id] = event.at
                running.append(command.request.id)

    for step in range(200):
        now = 0.05 * step
        chat = llmd.Request(id=f"chat{step}", prompt=range(900))
        handle(e.RequestArrived(now, chat))
        if step == 10:
            long = llmd.Request(id="long", prompt=range(6000), priority=1)
            handle(e.RequestArrived(now, long))
        while running and now - sent_at[running[0]] > 0.12:
            handle(e.RequestEnded(now, "w", running.pop(0), None))
    assert sent_at["long"] < 0.5 + 2.0 + 8 * 0.05 + 1.0
    assert len(sent_at) > 190


@pytest.mark.parametrize(
    "gate", [b.DeadlineInfeasible(), b.Saturation(max_wait_s=5.0)], ids=str
)
def test_work_that_goes_later_keeps_nobody_out(gate):
    shop = Shop(b.FlowControl(b.Bands([b.Band(), b.Band()]), gates=[gate]))
    shop.arrive("running")
    waiting = 0
    while not shop.failed:
        shop.arrive(f"batch{waiting}", tokens=8000, priority=1, deadline=20.0)
        waiting += 1
    assert waiting > 10
    shop.arrive("chat", deadline=5.0)
    assert [*shop.failed] == [f"batch{waiting - 1}"]


def test_another_worker_is_kept_when_the_one_that_was_leaves():
    flow = b.FlowControl(
        b.Bands([b.Band(), b.Band(max_wait=1.0)], every=1),
        rooms=[b.FixedRoom(prefill_tokens=2048), b.LongPrefillCap(long_tokens=2000)],
    )
    cluster = llmd.Cluster(balancer=flow)
    for id in "ab":
        cluster.handle(e.WorkerJoined(0.0, llmd.Worker(id=id, max_running=64)))
    for number in range(6):
        request = llmd.Request(id=f"chat{number}", prompt=range(2000))
        cluster.handle(e.RequestArrived(0.0, request))
    long = llmd.Request(id="long", prompt=range(6000), priority=1)
    cluster.handle(e.RequestArrived(0.0, long))
    for at in (2.0, 2.1):  # it is overdue, then it is its turn
        cluster.handle(e.Tick(at))
    first = flow._kept["long"].worker
    cluster.handle(e.WorkerLeft(3.0, first))
    cluster.handle(e.Tick(3.0))
    assert flow._kept["long"].worker == ("b" if first == "a" else "a")


def test_a_tuple_of_policies_is_no_policy():
    with pytest.raises(PolicyError, match="order"):
        b.FlowControl((b.Vtc(),))


class Boom(b.Room):
    """Raises in one hook, for one tenant or once."""

    def __init__(self, hook):
        self.hook, self.left = hook, 5

    def open(self, request, share, view):
        return np.ones(len(view.workers), dtype=np.bool_)

    def _raise(self, hook, tenant):
        if hook == self.hook and tenant == "bad" and self.left:
            self.left -= 1
            raise ValueError("boom")

    def queued(self, request, view):
        self._raise("queued", request.tenant)

    def unqueued(self, request, view):
        self._raise("unqueued", request.tenant)

    def dispatched(self, booking, view):
        self._raise("dispatched", booking.request.tenant)

    def generated(self, booking, tokens, view):
        self._raise("generated", booking.request.tenant)

    def ended(self, booking, view):
        self._raise("ended", booking.request.tenant)


@pytest.mark.parametrize(
    "hook", ["queued", "unqueued", "dispatched", "generated", "ended"]
)
@pytest.mark.parametrize("first", [True, False])
def test_a_hook_that_raises_leaves_no_count_behind(hook, first):
    band, cap = b.Band(order=b.Vtc(), max_requests=5), b.LongPrefillCap(long_tokens=2)
    rooms = [Boom(hook), cap] if first else [cap, Boom(hook)]
    flow = b.FlowControl(b.Bands([band]), rooms=rooms)
    shop = Shop(flow)
    for number in range(12):
        id = f"bad{number}"
        shop.arrive(id, tenant="bad")
        if id in shop.cluster.books:
            worker = shop.cluster.books.get(id).decision.decode
            shop.handle(e.FirstToken(shop.now, worker, id))
        if id in shop.cluster.books:
            shop.end(id)
    assert band.waiting_requests == band.waiting_tokens == 0
    assert band.order.ledger.waiting("bad") == 0
    assert band.account.running == 0
    assert flow.accounts["bad"].waiting == flow.accounts["bad"].running == 0
    assert cap.under_way("w0") == 0
    shop.arrive("good")
    assert "good" in shop.sent


def test_no_tokens_are_no_news():
    aimd = b.AimdRoom(itl_s=0.1)
    shop = Shop(b.FlowControl(rooms=[aimd]))
    shop.arrive("r")
    shop.handle(e.FirstToken(0.0, "w0", "r"))
    assert shop.handle(e.TokensGenerated(0.1, "w0", "r", 0)) == []
    shop.handle(e.TokensGenerated(0.2, "w0", "r", 1))
    assert not shop.failed
    assert shop.cluster.books.get("r").last_token_at == 0.2


def test_who_is_too_late_is_not_sent():
    shop = Shop(b.Fcfs())
    shop.arrive("running")
    shop.arrive("late", deadline=5.0)
    shop.now = 5.0
    shop.end("running")
    assert "late" not in shop.sent
    assert isinstance(shop.failed["late"], DeadlineExceeded)
    shop.tick(1.0)
    assert not shop.cluster.deadlines


class Listed(b.Room):
    def __init__(self, answer):
        self.answer = answer

    def open(self, request, share, view):
        return self.answer


@pytest.mark.parametrize("answer", [True, [True, True], [1], np.ones((1, 1), bool)])
def test_a_room_that_is_no_mask_is_named(answer):
    shop = Shop(b.FlowControl(rooms=[b.FixedRoom(), Listed(answer)]))
    shop.arrive("r")
    assert "Listed" in str(shop.failed["r"])


def test_any_priority_has_a_worth():
    for priority in (2000, -2000, 0):
        order = b.WeightedShortest()
        shop = Shop(order)
        shop.arrive("r", priority=priority)
        assert "r" in shop.sent


def test_an_order_that_grows_restless_in_a_band_is_asked():
    class Restless(b.Fcfs):
        flows = ()

        @property
        def restless(self):
            return self.flows

        def flow(self, request):
            return request.tenant

        def turn(self, flow, view):
            return view.now if flow == "a" else 5.0

    order = Restless()
    shop = Shop(b.Bands([order]))
    shop.arrive("running")
    shop.arrive("a", tenant="a")
    shop.arrive("b", tenant="b")
    order.flows = ("a",)
    shop.now = 9.0
    shop.end("running")
    assert shop.sent[-1] == "b"
