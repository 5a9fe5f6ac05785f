"""Any sequence of events leaves the cluster's books balanced."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import llmd
from llmd import balancer as b
from llmd import commands as c
from llmd import events as e
from llmd.errors import UnknownModel, WorkerLost


def first_come():
    return llmd.Fcfs(max_running=3, max_waiting=20)


def counted_tokens():
    return b.FlowControl(b.Vtc(b.ShortestPrefill()), rooms=[b.FixedRoom(requests=3)])


def deficits():
    order = b.D2lpm(quantum=64.0, worker_quantum=64.0, look=2)
    return b.FlowControl(order, rooms=[b.FixedRoom(requests=3)])


def everything():
    bands = [
        b.Band(order=b.Las(b.Edf(), half_life=2.0), max_wait=4.0),
        b.Band(order=b.Drr(b.WeightedShortest(), quantum=64.0), max_requests=9),
        b.Band(order=b.Dlpm(quantum=64.0), ceiling=0.5, max_wait=4.0, max_tokens=500),
    ]
    return b.FlowControl(
        b.Bands(bands, every=3),
        gates=[
            b.QueueFull(requests=20),
            b.RateLimit(requests_per_min=120.0, tokens_per_min=9000.0),
            b.DeadlineInfeasible(),
            b.Saturation(max_wait_s=1.0),
        ],
        rooms=[
            b.FixedRoom(requests=3, kv_usage=0.5),
            b.AimdRoom(itl_s=0.5, start=3, highest=3, samples=1),
            b.LongPrefillCap(long_tokens=60),
            b.PromptBudget(tokens=150.0, window_s=1.0),
        ],
    )


BALANCERS = (first_come, counted_tokens, deficits, everything)
# These leave no worker with room while anybody waits.
CONSERVING = (first_come, counted_tokens, deficits)


def make_cluster(observer):
    return llmd.Cluster(
        router=2 * llmd.PrefixOverlap() + llmd.QueueDepth(),
        balancer=first_come(),
        autoscaler=llmd.TargetConcurrency(requests_per_worker=4, max_workers=5),
        seed=1,
        observer=observer,
    )


class ClusterMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.log = []
        self.cluster = make_cluster(self.log.append)
        self.now, self.count = 0.0, 0
        self.where: dict[str, str] = {}
        self.streamed: set[str] = set()
        self.waiting: set[str] = set()
        self.workers: set[str] = set()
        self.gone: list[tuple[str, str]] = []
        self.requests: dict[str, llmd.Request] = {}
        self.balancer = first_come

    def feed(self, event):
        for command in self.cluster.handle(event):
            match command:
                case c.Dispatch(request=request, decision=decision):
                    assert request.id in self.waiting
                    assert decision.decode in self.workers
                    self.waiting.remove(request.id)
                    self.where[request.id] = decision.decode
                case c.Requeue(request=request):
                    assert request.id not in self.streamed
                    if request.id in self.where:
                        self.gone.append((self.where.pop(request.id), request.id))
                    self.waiting.add(request.id)
                case c.Fail(request=request):
                    self.waiting.discard(request.id)
                    self.where.pop(request.id, None)
                case c.Abort(worker=worker, request_id=id):
                    assert self.where.pop(id) == worker
                    self.gone.append((worker, id))
                case c.Scale(workers=workers):
                    assert 1 <= workers <= 5

    def draw_running(self, data):
        return data.draw(st.sampled_from(sorted(self.where)))

    @rule(gap=st.floats(0, 5))
    def wait(self, gap):
        self.now += gap
        self.feed(e.Tick(self.now))

    @rule(
        tokens=st.integers(1, 99),
        start=st.integers(0, 2),
        salt=st.sampled_from(["", "x"]),
        patience=st.sampled_from([1.0, 8.0, float("inf")]),
        tenant=st.sampled_from("abc"),
        priority=st.integers(-1, 3),
    )
    def arrive(self, tokens, start, salt, patience, tenant, priority):
        self.count += 1
        request = llmd.Request(
            id=f"r{self.count}",
            arrived_at=self.now,
            prompt=range(start, start + tokens),
            salt=salt,
            deadline=self.now + patience,
            tenant=tenant,
            priority=priority,
            sheddable=priority > 1,
        )
        self.requests[request.id] = request
        try:
            self.cluster.check(request)
        except llmd.errors.PromptTooLong:
            return
        self.waiting.add(request.id)
        self.feed(e.RequestArrived(self.now, request))

    @rule(make=st.sampled_from(BALANCERS))
    def replace_balancer(self, make):
        self.balancer = make
        self.cluster.balancer = make()
        self.log.append(make)
        self.feed(e.Tick(self.now))

    @rule(size=st.sampled_from([16, 32]), longest=st.sampled_from([50, 1 << 30]))
    def join(self, size, longest):
        self.count += 1
        worker = llmd.Worker(
            id=f"w{self.count}",
            kv_blocks=100,
            block_tokens=size,
            max_model_tokens=longest,
        )
        self.workers.add(worker.id)
        self.feed(e.WorkerJoined(self.now, worker))

    @rule(data=st.data(), replaced=st.booleans())
    def leave(self, data, replaced):
        if self.workers:
            worker = data.draw(st.sampled_from(sorted(self.workers)))
            self.workers.remove(worker)
            self.feed(e.WorkerLeft(self.now, worker, replaced))
            assert worker not in self.where.values()

    @rule(data=st.data(), state=st.sampled_from(llmd.State))
    def change(self, data, state):
        if self.workers:
            worker = data.draw(st.sampled_from(sorted(self.workers)))
            self.feed(e.WorkerChanged(self.now, worker, state=state))

    @rule(data=st.data(), size=st.sampled_from([16, 64]))
    def restate(self, data, size):
        if self.workers:
            worker = data.draw(st.sampled_from(sorted(self.workers)))
            facts = llmd.Worker(id=worker, kv_blocks=50, block_tokens=size)
            self.feed(e.WorkerChanged(self.now, worker, facts=facts))

    @rule(data=st.data())
    def first_token(self, data):
        if self.where:
            id = self.draw_running(data)
            self.streamed.add(id)
            self.feed(e.FirstToken(self.now, self.where[id], id))

    @rule(data=st.data(), tokens=st.integers(1, 9))
    def generate(self, data, tokens):
        if running := sorted(self.streamed & self.where.keys()):
            id = data.draw(st.sampled_from(running))
            self.feed(e.TokensGenerated(self.now, self.where[id], id, tokens))

    @rule(data=st.data(), error=st.sampled_from([None, "broke"]))
    def end(self, data, error):
        if self.where:
            id = self.draw_running(data)
            worker = self.where.pop(id) if error is None else self.where[id]
            self.feed(e.RequestEnded(self.now, worker, id, error))

    @rule(data=st.data())
    def cancel(self, data):
        if known := sorted(self.waiting | self.where.keys()):
            id = data.draw(st.sampled_from(known))
            self.waiting.discard(id)
            self.feed(e.RequestCancelled(self.now, id))

    @rule(data=st.data(), tier=st.sampled_from(llmd.Tier), drop=st.booleans())
    def blocks(self, data, tier, drop):
        if self.workers and self.requests:
            worker = data.draw(st.sampled_from(sorted(self.workers)))
            request = self.requests[data.draw(st.sampled_from(sorted(self.requests)))]
            if drop:
                hashes = request.hashes(16)
                self.feed(e.BlocksRemoved(self.now, worker, hashes, tier))
            else:
                size = data.draw(st.sampled_from([16, 32]))
                hashes = request.hashes(size)
                self.feed(e.BlocksStored(self.now, worker, hashes, size, tier))

    @rule()
    def late(self):
        # A request may be tried twice on one worker; its events are then no late ones.
        for worker, id in [pair for pair in self.gone if pair[0] not in self.workers]:
            self.feed(e.FirstToken(self.now, worker, id))
            self.feed(e.RequestEnded(self.now, worker, id))

    @invariant()
    def books_balance(self):
        workers = self.cluster.view.workers
        assert set(workers.ids) == self.workers
        assert {r.id for r in self.cluster.view.waiting} == self.waiting
        assert int(workers.running_requests.sum()) == len(self.where)
        waiting = self.where.keys() - self.streamed
        assert int(workers.waiting_requests.sum()) == len(waiting)
        assert (workers.running_requests <= 3).all()
        for row, id in enumerate(workers.ids):
            if id not in self.where.values():
                assert workers.prefill_tokens[row] == 0
                assert workers.context_tokens[row] == 0
        assert (workers.prefill_tokens >= 0).all()
        assert self.cluster.view.waiting.prompt_tokens == sum(
            self.requests[id].prompt_tokens for id in self.waiting
        )
        self.cluster.index.check()
        assert not self.cluster.waiting.faults

    @invariant()
    def work_is_conserved(self):
        if self.balancer not in CONSERVING:
            return
        workers = self.cluster.view.workers
        room = workers.ready() & (workers.running_requests < 3)
        longest = workers.max_model_tokens[room].max(initial=0)
        for request in self.cluster.view.waiting:
            # A retry may wait for a worker on which it did not fail.
            if not self.cluster.waiting._entries[request.id].failed_on:
                assert request.prompt_tokens + 1 > longest

    def teardown(self):
        replayed = []
        twin = make_cluster(replayed.append)
        for entry in list(self.log):
            if entry in BALANCERS:
                twin.balancer = entry()
                replayed.append(entry)
            elif isinstance(entry, e.Event):
                twin.handle(entry)
        assert replayed == self.log


TestCluster = ClusterMachine.TestCase
TestCluster.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


def test_what_nobody_else_can_serve_ends_with_a_worker_that_is_not_replaced():
    cluster = llmd.Cluster(balancer=llmd.Fcfs(max_running=1))
    long = {"models": {"m"}, "loras": {"l"}, "max_model_tokens": 100}
    cluster.handle(e.WorkerJoined(0.0, llmd.Worker(id="long", **long)))
    short = llmd.Worker(id="short", models={"m"}, max_model_tokens=10)
    cluster.handle(e.WorkerJoined(0.0, short))
    asked = {
        "any": {"prompt": [1] * 3},
        "long": {"prompt": [1] * 30, "model": "m"},
        "adapted": {"prompt": [1] * 3, "model": "m", "lora": "l"},
        "short": {"prompt": [1] * 3, "model": "m"},
    }
    for worker in ("long", "short"):
        state = llmd.State.SLEEPING
        cluster.handle(e.WorkerChanged(0.5, worker, state=state))
    for id, more in asked.items():
        assert cluster.handle(e.RequestArrived(1.0, llmd.Request(id=id, **more))) == []
    failed = cluster.handle(e.WorkerLeft(2.0, "long", replaced=False))
    assert {one.request.id for one in failed} == {"long", "adapted"}
    assert {type(one.error) for one in failed} == {WorkerLost}
    # A worker that starts may turn out to serve anything.
    starting = llmd.Worker(id="new", state=llmd.State.STARTING)
    cluster.handle(e.WorkerJoined(2.5, starting))
    assert cluster.handle(e.WorkerLeft(3.0, "short", replaced=False)) == []
    assert cluster.handle(e.WorkerLeft(3.5, "new", replaced=True)) == []
    assert cluster.models == {"m"}


def test_a_model_is_forgotten_with_its_last_worker_unless_it_was_welcomed():
    cluster = llmd.Cluster()
    cluster.handle(e.ModelAdded(0.0, "welcome"))
    worker = llmd.Worker(id="w", models={"m", "welcome"}, state=llmd.State.SLEEPING)
    cluster.handle(e.WorkerJoined(0.0, worker))
    for model in worker.models:
        request = llmd.Request(id=model, prompt=[1], model=model)
        cluster.handle(e.RequestArrived(1.0, request))
    [failed] = cluster.handle(e.WorkerLeft(2.0, "w", replaced=False))
    assert failed.request.id == "m"
    assert cluster.models == {"welcome"}
    assert cluster.waits("welcome")
    late = llmd.Request(id="late", prompt=[1], model="m")
    with pytest.raises(UnknownModel):
        cluster.handle(e.RequestArrived(3.0, late))
