"""The bounds that fair orders promise, whatever clients do."""

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

import llmd
from llmd import balancer as b

PLACES, LONGEST_PROMPT, LONGEST_OUTPUT = 3, 60, 20
TENANTS = "abc"
# All that the running requests can hold at once, prompts and outputs.
BATCH_TOKENS = PLACES * (LONGEST_PROMPT + LONGEST_OUTPUT)

steps = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "arrive", "token", "token", "end", "cancel"]),
        st.sampled_from(TENANTS),
        st.integers(1, LONGEST_PROMPT),
        st.integers(0, 30),
    ),
    min_size=20,
    max_size=100,
)


class Gaps:
    """The widest difference in service, over every interval two tenants share."""

    def __init__(self, weights):
        self.weights = weights
        self.service = dict.fromkeys(TENANTS, 0.0)
        self.seen = {}
        self.widest = 0.0

    def add(self, tenant, amount):
        self.service[tenant] += amount / self.weights.get(tenant, 1.0)

    def look(self, waiting):
        for f in TENANTS:
            for g in TENANTS:
                if f >= g or not (f in waiting and g in waiting):
                    self.seen.pop((f, g), None)
                    continue
                gap = self.service[f] - self.service[g]
                low, high = self.seen.get((f, g), (gap, gap))
                low, high = min(low, gap), max(high, gap)
                self.seen[f, g] = (low, high)
                self.widest = max(self.widest, high - low)


def run(shop, balancer, actions, price, token_price, weights=(), workers=1):
    """Carry out *actions*; return the widest gap in service."""
    sim = shop(balancer, places=PLACES // workers, workers=workers)
    gaps = Gaps(dict(weights))
    counted, tokens = 0, {}
    for act, tenant, prompt, pick in actions:
        running = list(sim.where)
        if act == "arrive":
            sim.arrive(tenant, prompt)
        elif act == "cancel" and sim.waiting:
            sim.cancel(sim.waiting[pick % len(sim.waiting)])
        elif running and act == "token":
            id = running[pick % len(running)]
            if tokens.get(id, 0) < LONGEST_OUTPUT:
                tokens[id] = tokens.get(id, 0) + 1
                gaps.add(sim.requests[id].tenant, token_price)
                sim.token(id)
        elif running and act == "end":
            sim.end(running[pick % len(running)])
        sent, counted = sim.sent[counted:], len(sim.sent)
        for id in sent:
            request = sim.requests[id]
            gaps.add(request.tenant, price(request))
        gaps.look({sim.requests[id].tenant for id in sim.waiting})
    assert not sim.failed
    return gaps.widest


def prompt_price(request):
    return request.prompt_tokens


QUANTUM = 40.0
DEFICIT_BOUND = 2 * (LONGEST_PROMPT + 2 * BATCH_TOKENS + QUANTUM)
quick = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@quick
@given(steps)
def test_vtc_holds_its_bound_under_any_arrivals(shop, actions):
    gap = run(shop, b.Vtc(), actions, prompt_price, 2.0)
    assert gap <= 2 * max(LONGEST_PROMPT, 2 * BATCH_TOKENS)


@quick
@given(steps)
def test_vtc_holds_a_tight_bound_when_prompts_are_all_there_is(shop, actions):
    gap = run(shop, b.Vtc(output_weight=0.0), actions, prompt_price, 0.0)
    assert gap <= 2 * LONGEST_PROMPT


@quick
@given(steps)
def test_weights_divide_service(shop, actions):
    weights = {"a": 4.0, "b": 0.5}
    vtc = b.Vtc(output_weight=0.0, weights=weights)
    gap = run(shop, vtc, actions, prompt_price, 0.0, weights.items())
    assert gap <= 2 * LONGEST_PROMPT / 0.5


@quick
@given(steps)
@pytest.mark.parametrize("make", [b.Drr, b.Dlpm, b.D2lpm])
@pytest.mark.parametrize("workers", [1, 3])
def test_deficits_hold_their_bound_under_any_arrivals(shop, make, workers, actions):
    order = make(quantum=QUANTUM)
    gap = run(shop, order, actions, prompt_price, 2.0, workers=workers)
    assert gap <= DEFICIT_BOUND


class AFirst(b.Fcfs):
    """Serves tenant a before all others."""

    def key(self, request, view):
        return request.tenant


PROMPTS = 2 * LONGEST_PROMPT
BOUNDS = [
    (b.Vtc, {}, 2.0, 2 * max(LONGEST_PROMPT, 2 * BATCH_TOKENS)),
    (b.Vtc, {"output_weight": 0.0}, 0.0, PROMPTS),
    (b.Drr, {"quantum": QUANTUM}, 2.0, DEFICIT_BOUND),
    (b.Dlpm, {"quantum": QUANTUM}, 2.0, DEFICIT_BOUND),
    (b.D2lpm, {"quantum": QUANTUM}, 2.0, DEFICIT_BOUND),
    (b.Drr, {"quantum": QUANTUM, "output_weight": 0.0}, 0.0, PROMPTS + 2 * QUANTUM),
    (b.Dlpm, {"quantum": QUANTUM, "output_weight": 0.0}, 0.0, PROMPTS + 2 * QUANTUM),
    (b.FairRoundRobin, {}, 0.0, 2),
]


def siege(lengths, outputs):
    """All three tenants wait throughout, a with the longest work, b the shortest."""
    actions = []
    for tenant in "abc":
        sizes = {"a": [LONGEST_PROMPT], "b": [1], "c": lengths}[tenant]
        actions += [("arrive", tenant, sizes[n % len(sizes)], 0) for n in range(60)]
    for turn in range(100):
        actions += [("token", "", 1, pick) for pick in (0, 1, 2) * outputs]
        actions.append(("end", "", 1, turn % PLACES))
    return actions


@settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.integers(1, LONGEST_PROMPT), min_size=1), st.integers(0, 2))
@pytest.mark.parametrize(("make", "options", "token_price", "bound"), BOUNDS)
@pytest.mark.parametrize("workers", [1, 3])
def test_bounds_hold_where_unfair_orders_break_them(
    shop, make, options, token_price, bound, workers, lengths, outputs
):
    price = (lambda request: 1.0) if make is b.FairRoundRobin else prompt_price

    def gap(order):
        actions = siege(lengths, outputs)
        return run(shop, order, actions, price, token_price, workers=workers)

    assert gap(make(**options)) <= bound
    assert gap(b.Fcfs()) > bound
    assert gap(AFirst()) > bound


@quick
@given(steps)
@pytest.mark.parametrize("make", [b.Drr, b.Dlpm])
def test_deficits_on_prompts_alone_stay_within_a_quantum(shop, make, actions):
    order = make(quantum=QUANTUM, output_weight=0.0)
    gap = run(shop, order, actions, prompt_price, 0.0)
    assert gap <= 2 * (LONGEST_PROMPT + QUANTUM)


@quick
@given(steps)
def test_round_robin_sends_as_many_for_each(shop, actions):
    assert run(shop, b.FairRoundRobin(), actions, lambda request: 1.0, 0.0) <= 2


@quick
@given(steps)
def test_first_come_first_served_holds_no_such_bound(shop, actions):
    # The bounds above can fail: this is how wide a gap FCFS may leave.
    flood = [("arrive", "a", LONGEST_PROMPT, 0)] * 20
    flood += [("arrive", "b", 1, 0), *[("end", "a", 1, 0)] * 15]
    gap = run(shop, b.Fcfs(), flood, prompt_price, 0.0)
    assert gap > 2 * LONGEST_PROMPT


def test_an_idle_tenant_saves_nothing_up(shop):
    sim = shop(b.Vtc(), places=1)
    for _ in range(6):
        sim.arrive("a", 50)
    for _ in range(3):
        sim.end(next(iter(sim.where)))
    for _ in range(3):
        sim.arrive("b", 50)
    order = sim.drain()
    # Level with a on its return: its first goes ahead, not all three of them.
    assert [id[0] for id in order] == ["a", "b", "a", "a", "b", "b"]


def test_least_attained_service_goes_first_and_is_forgotten(shop):
    las = b.Las(half_life=10.0)
    sim = shop(las, places=1)
    first = sim.arrive("a", 8)
    for _ in range(2):
        sim.arrive("a", 8)
    sim.arrive("b", 8)
    sim.end(first)
    assert sim.sent[-1].startswith("b")
    sim.drain()
    assert len(las.ledger) == 2
    sim.wait(10.0 * 6)
    sim.arrive("c", 1)
    assert "a" not in las.ledger
    assert "b" not in las.ledger


def test_decay_changes_no_order_between_charges(shop):
    las = b.Las(half_life=1.0)
    sim = shop(las, places=1)
    sim.arrive("a", 60)
    sim.wait(3.0)
    sim.arrive("b", 4)
    sim.arrive("a", 1)
    sim.end(next(iter(sim.where)))
    assert sim.sent[-1].startswith("b")
    # It began as anybody does, with one token, and had 60 three half-lives ago.
    assert 2 ** (las.ledger["a"] - sim.now) == pytest.approx(61 / 8)


@pytest.mark.parametrize("make", [b.Vtc, b.Drr, b.Las, b.FairRoundRobin, b.Dlpm])
def test_idle_tenants_are_forgotten(shop, make):
    order = make()
    order.ledger.max_idle = 50
    sim = shop(order, places=1)
    for number in range(300):
        id = sim.arrive(f"tenant{number}", 5)
        sim.end(id)
    assert len(order.ledger) <= 51


def test_dlpm_goes_by_prefix_and_vtc_does_not(shop):
    shared = list(range(64))
    for order, then in ((b.Dlpm(quantum=1e6), "b3"), (b.Vtc(), "b2")):
        sim = shop(order, places=1, block_tokens=16)
        first = sim.arrive("a", shared)
        sim.arrive("b", 80)
        sim.arrive("b", [*shared, 1, 2, 3])
        sim.end(first)
        assert sim.sent[-1] == then


def test_dlpm_sees_what_dispatches_make_worth_it(shop):
    # Neither is cached on arrival; once the first leaves, its relative is.
    sim = shop(b.Dlpm(quantum=1e6), places=1, block_tokens=16)
    running = sim.arrive("a", 10)
    sim.arrive("a", list(range(100, 164)), id="head")
    sim.arrive("a", list(range(500, 564)), id="other")
    sim.arrive("a", [*range(100, 164), 7], id="relative")
    sim.end(running)
    assert sim.sent[-1] == "head"
    sim.end("head")
    assert sim.sent[-1] == "relative"


def test_d2lpm_leaves_a_worker_it_has_used_up(shop):
    shared = list(range(2048))
    homes = {}
    for order in (b.Dlpm(), b.D2lpm(worker_quantum=100.0)):
        sim = shop(order, places=9, workers=2, block_tokens=16)
        first = llmd.Request(id="first", prompt=shared)
        sim.feed(llmd.events.BlocksStored(0.0, "w0", first.hashes(16), 16))
        for number in range(4):
            id = sim.arrive("a", [*shared, *[number] * 64])
            homes.setdefault(type(order), []).append(sim.where[id])
            sim.token(id)
    assert homes[b.Dlpm] == ["w0"] * 4
    assert homes[b.D2lpm] == ["w0", "w0", "w1", "w0"]
