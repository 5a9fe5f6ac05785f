"""Where prompts are computed, and why, with the one index that routing reads."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import llmd
from llmd import commands as c
from llmd import events as e
from llmd.machines import A100_PCIE, Machine
from llmd.machines.shape import QWEN25_7B
from llmd.router import Disaggregated, UniformLink
from llmd.types import Role


def fleet(router, prefill=("p0",), decode=("d0",), both=(), **options):
    cluster = llmd.Cluster(router=router, **options)
    roles = [(prefill, Role.PREFILL), (decode, Role.DECODE), (both, Role.BOTH)]
    for ids, role in roles:
        for id in ids:
            worker = llmd.Worker(id=id, role=role, block_tokens=16, kv_blocks=10_000)
            cluster.handle(e.WorkerJoined(0.0, worker))
    return cluster


def ask(cluster, id, tokens, at=1.0, start=0):
    request = llmd.Request(id=id, prompt=range(start, start + tokens), arrived_at=at)
    commands = cluster.handle(e.RequestArrived(at, request))
    return commands[0].decision if commands else None


def stream(cluster, worker, count):
    """Let *worker* decode *count* requests, so that a prompt there would hurt."""
    for i in range(count):
        ask(cluster, f"busy{i}", 8, at=0.5, start=100_000 * (i + 1))
        cluster.handle(e.FirstToken(0.5, worker, f"busy{i}"))


def test_a_short_prompt_stays_and_says_why():
    cluster = fleet(Disaggregated(min_uncached_tokens=16))
    decision = ask(cluster, "r", 15)
    assert (decision.decode, decision.prefill) == ("d0", None)
    assert "not disaggregated: 15 uncached tokens, threshold 16" in str(
        decision.explain()
    )


def test_a_long_prompt_goes_to_the_prefill_worker():
    cluster = fleet(Disaggregated(min_uncached_tokens=16))
    decision = ask(cluster, "r", 17)
    assert (decision.decode, decision.prefill) == ("d0", "p0")
    text = str(decision.explain())
    assert "prompt computed on p0" in text
    assert "transfer" in text


def test_the_threshold_counts_uncached_tokens_by_the_one_index():
    cluster = fleet(Disaggregated(min_uncached_tokens=64))
    first = ask(cluster, "r", 512)
    assert first.prefill == "p0"
    cluster.handle(e.PrefillEnded(1.1, "p0", "r"))
    cluster.handle(e.FirstToken(1.2, "d0", "r"))
    again = ask(cluster, "s", 520, at=1.3)
    assert again.prefill is None, "the decode worker holds all but 8 tokens"
    assert "8 uncached tokens" in again.notes[-1]


def test_after_a_hand_off_the_index_knows_both_copies():
    cluster = fleet(Disaggregated(min_uncached_tokens=16))
    ask(cluster, "r", 512)
    cluster.handle(e.PrefillEnded(1.1, "p0", "r"))
    cluster.handle(e.FirstToken(1.2, "d0", "r"))
    # Both engines tell what they stored; the guesses at dispatch lapse.
    request = llmd.Request(id="s", prompt=range(512))
    for worker in ("p0", "d0"):
        cluster.handle(e.BlocksStored(1.3, worker, request.hashes(16), 16))
    held = cluster.index.match(request, ("d0", "p0"), 99.0)
    assert held[:, 0].tolist() == [512, 512]


def test_an_idle_decode_worker_computes_its_own_prompt():
    cluster = fleet(Disaggregated())
    decision = ask(cluster, "r", 4000)
    assert decision.prefill is None
    assert "against" in decision.notes[-1]


def test_a_decode_worker_that_streams_is_spared_a_long_prompt():
    cluster = fleet(Disaggregated())
    stream(cluster, "d0", 4)
    assert ask(cluster, "long", 4000).prefill == "p0"


@pytest.mark.parametrize("slow", ["p0", "d0"])
def test_workers_are_reckoned_with_as_fast_as_their_machines_are(slow):
    rates = {"slow": Machine.of(A100_PCIE, QWEN25_7B), "fast": Machine()}
    router = Disaggregated(machines=rates)
    cluster = llmd.Cluster(router=router)
    for id, role in (("p0", Role.PREFILL), ("d0", Role.DECODE)):
        machine = "slow" if id == slow else "fast"
        worker = llmd.Worker(id=id, role=role, machine=machine, kv_blocks=10_000)
        cluster.handle(e.WorkerJoined(0.0, worker))
    decision = ask(cluster, "long", 4000)
    # Nobody else is there: the prompt goes where it is computed sooner.
    assert decision.prefill == (None if slow == "p0" else "p0")
    [term, *_] = [t for t in decision.terms if t.name == "own prefill"]
    name = "slow" if slow == "d0" else "fast"
    assert term.value.tolist() == [pytest.approx(rates[name].prefill_s(4000.0))]


def test_a_slow_link_keeps_the_prompt_where_it_is_decoded():
    slow = UniformLink(bytes_per_s=0.09e9)  # what pulling took in the study
    cluster = fleet(Disaggregated(link=slow))
    stream(cluster, "d0", 4)
    decision = ask(cluster, "long", 4000)
    assert decision.prefill is None
    assert "transfer" in decision.notes[-1]


def test_a_queue_of_prompts_keeps_a_prompt_where_it_is_decoded():
    cluster = fleet(Disaggregated(prefill=llmd.LeastWork(), decode=llmd.LeastWork()))
    stream(cluster, "d0", 1)
    decisions = [ask(cluster, f"r{i}", 4000, start=i * 7919) for i in range(12)]
    assert decisions[0].prefill == "p0"
    assert None in [decision.prefill for decision in decisions]


def test_without_a_prefill_worker_everything_is_aggregated():
    cluster = fleet(Disaggregated(min_uncached_tokens=1), prefill=())
    decision = ask(cluster, "r", 4000)
    assert decision.prefill is None
    assert "no other worker" in decision.notes[-1]


def test_without_a_decode_worker_it_waits():
    cluster = fleet(Disaggregated(), decode=())
    assert ask(cluster, "r", 100) is None
    assert cluster.waits("r")


def test_roles_may_change_at_any_time():
    cluster = fleet(Disaggregated(min_uncached_tokens=1))
    assert ask(cluster, "r", 100).prefill == "p0"
    cluster.handle(e.WorkerChanged(2.0, "p0", role=Role.DECODE))
    cluster.handle(e.WorkerChanged(2.0, "d0", role=Role.PREFILL))
    decision = ask(cluster, "s", 100, at=2.1)
    assert (decision.decode, decision.prefill) == ("p0", "d0")


def test_pairs_are_made_by_link():
    def link(sources, target, moved_bytes):
        near = {"d0": "p0", "d1": "p1"}[target]
        return np.array([1e-3 if source == near else 1.0 for source in sources])

    cluster = fleet(
        Disaggregated(link=link, min_uncached_tokens=1),
        prefill=("p0", "p1"),
        decode=("d0", "d1"),
    )
    pairs = set()
    for i in range(20):
        decision = ask(cluster, f"r{i}", 300, start=i * 7919)
        pairs.add((decision.prefill, decision.decode))
    assert pairs == {("p0", "d0"), ("p1", "d1")}


def test_no_way_between_two_workers_rules_the_pair_out():
    def link(sources, target, moved_bytes):
        return np.full(len(sources), np.inf)

    cluster = fleet(Disaggregated(link=link, min_uncached_tokens=1))
    decision = ask(cluster, "r", 300)
    assert decision.prefill is None


def test_a_link_of_a_wrong_shape_is_a_policy_error():
    cluster = fleet(Disaggregated(link=lambda s, t, b: np.zeros(3)))
    request = llmd.Request(id="r", prompt=range(100))
    [failed] = cluster.handle(e.RequestArrived(1.0, request))
    assert isinstance(failed, c.Fail)
    assert isinstance(failed.error, llmd.errors.PolicyError)


@pytest.mark.parametrize("score", [False, True])
def test_two_and_two_all_carry_traffic(score):
    inner = 3 * llmd.PrefixOverlap() + 2 * llmd.QueueDepth()
    cluster = fleet(
        Disaggregated(
            prefill=inner if score else llmd.EarliestFirstToken(),
            decode=inner if score else llmd.EarliestFirstToken(),
            min_uncached_tokens=16,
        ),
        prefill=("p0", "p1"),
        decode=("d0", "d1"),
    )
    used = set()
    for i in range(16):
        decision = ask(cluster, f"r{i}", 600, start=i * 7919)
        used |= {decision.decode, decision.prefill}
    assert used == {"p0", "p1", "d0", "d1"}


def test_precise_prefixes_choose_the_prefill_worker_that_holds_them():
    cluster = fleet(
        Disaggregated(min_uncached_tokens=16), prefill=("p0", "p1"), decode=("d0", "d1")
    )
    shared = llmd.Request(id="s", prompt=range(800))
    cluster.handle(e.BlocksStored(0.5, "p1", shared.hashes(16), 16))
    assert ask(cluster, "r", 900).prefill == "p1"


def test_a_failed_prefill_worker_costs_the_client_nothing():
    cluster = fleet(Disaggregated(min_uncached_tokens=1))
    ask(cluster, "r", 300)
    commands = cluster.handle(e.WorkerLeft(2.0, "p0"))
    kinds = [type(command) for command in commands]
    assert kinds == [c.Abort, c.Requeue, c.Dispatch]
    assert commands[-1].decision.prefill is None


class PdMachine(RuleBasedStateMachine):
    """Both legs of many requests, in any order of events: the books balance."""

    def __init__(self):
        super().__init__()
        self.cluster = llmd.Cluster(
            router=Disaggregated(min_uncached_tokens=20), seed=1, max_attempts=2
        )
        self.now, self.names = 0.0, 0
        self.workers: dict[str, Role] = {}
        self.running: dict[str, llmd.Decision] = {}
        self.prefilled: set[str] = set()
        self.streamed: set[str] = set()

    def feed(self, event):
        for command in self.cluster.handle(event):
            match command:
                case c.Dispatch(request=request, decision=decision):
                    assert Role.DECODE in self.workers[decision.decode]
                    if decision.prefill is not None:
                        assert Role.PREFILL in self.workers[decision.prefill]
                        assert decision.prefill != decision.decode
                    self.running[request.id] = decision
                case c.Requeue(request=request) | c.Fail(request=request):
                    self.forget(request.id)

    def forget(self, id):
        self.running.pop(id, None)
        self.prefilled.discard(id)
        self.streamed.discard(id)

    @rule(role=st.sampled_from([Role.PREFILL, Role.DECODE, Role.BOTH]))
    def join(self, role):
        self.names += 1
        id = f"w{self.names}"
        self.workers[id] = role
        worker = llmd.Worker(id=id, role=role, kv_blocks=100, max_running=4)
        self.feed(e.WorkerJoined(self.now, worker))

    @rule(data=st.data())
    def leave(self, data):
        if self.workers:
            id = data.draw(st.sampled_from(sorted(self.workers)))
            del self.workers[id]
            self.feed(e.WorkerLeft(self.now, id))

    @rule(data=st.data(), role=st.sampled_from([Role.PREFILL, Role.DECODE, Role.BOTH]))
    def change(self, data, role):
        if self.workers:
            id = data.draw(st.sampled_from(sorted(self.workers)))
            self.workers[id] = role
            self.feed(e.WorkerChanged(self.now, id, role=role))

    @rule(tokens=st.integers(1, 60), start=st.sampled_from([0, 1000, 2000]))
    def arrive(self, tokens, start):
        self.names += 1
        prompt = range(start, start + tokens)
        request = llmd.Request(id=f"r{self.names}", prompt=prompt, max_new_tokens=4)
        self.feed(e.RequestArrived(self.now, request))

    def draw(self, data, ids):
        return data.draw(st.sampled_from(sorted(ids))) if ids else None

    @rule(data=st.data())
    def prefill_ends(self, data):
        split = [id for id, d in self.running.items() if d.prefill is not None]
        if id := self.draw(data, set(split) - self.prefilled - self.streamed):
            self.prefilled.add(id)
            self.feed(e.PrefillEnded(self.now, self.running[id].prefill, id))

    @rule(data=st.data())
    def first_token(self, data):
        if id := self.draw(data, set(self.running) - self.streamed):
            self.streamed.add(id)
            self.feed(e.FirstToken(self.now, self.running[id].decode, id, 0))

    @rule(data=st.data(), error=st.sampled_from([None, "broke"]), prefill=st.booleans())
    def end(self, data, error, prefill):
        if id := self.draw(data, set(self.running)):
            decision = self.running[id]
            worker = decision.decode
            early = id not in self.prefilled | self.streamed
            if prefill and decision.prefill is not None and early and error:
                worker = decision.prefill
            if error is None:
                self.forget(id)
            self.feed(e.RequestEnded(self.now, worker, id, error))

    @rule(data=st.data())
    def cancel(self, data):
        if id := self.draw(data, set(self.running)):
            self.forget(id)
            self.feed(e.RequestCancelled(self.now, id))

    @rule(seconds=st.floats(0, 2))
    def wait(self, seconds):
        self.now += seconds
        self.feed(e.Tick(self.now))

    @invariant()
    def books_balance(self):
        workers = self.cluster.view.workers
        held = dict.fromkeys(workers.ids, 0)
        for id, decision in self.running.items():
            held[decision.decode] += 1
            if decision.prefill and id not in self.prefilled | self.streamed:
                held[decision.prefill] += 1
        assert (
            dict(zip(workers.ids, workers.running_requests.tolist(), strict=True))
            == held
        )
        for row, id in enumerate(workers.ids):
            if not held[id]:
                assert workers.prefill_tokens[row] == 0
                assert workers.context_tokens[row] == 0
        assert (workers.prefill_tokens >= 0).all()
        assert (workers.waiting_requests >= 0).all()
        self.cluster.index.check()


TestPd = PdMachine.TestCase
TestPd.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
