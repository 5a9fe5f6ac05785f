"""Priority bands: strict, held back, aged, bounded, and shed."""

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from llmd import balancer as b
from llmd.errors import PolicyError, Rejected


def bands(*of, **extra):
    return b.Bands(of or [b.Band(name="chat"), b.Band(name="batch")], **extra)


def test_a_higher_band_goes_first_whatever_its_order(shop):
    sim = shop(bands(b.Vtc(), b.Fcfs()), places=1)
    sim.arrive(priority=1, id="running")
    sim.arrive(priority=1, id="batch")
    sim.arrive("x", priority=0, id="chat")
    sim.arrive("y", priority=-7, id="beyond the ends")
    assert sim.drain() == ["running", "chat", "beyond the ends", "batch"]


def test_held_back_places_are_there_for_a_burst(shop):
    order = bands(b.Band(name="chat"), b.Band(name="batch", ceiling=0.5))
    sim = shop(b.FlowControl(order, rooms=[b.FixedRoom(requests=4)]), places=8)
    for number in range(4):
        sim.arrive(priority=1, id=f"batch{number}")
    assert sim.sent == ["batch0", "batch1"]
    sim.arrive(priority=0, id="chat")
    assert sim.sent[-1] == "chat"


def test_a_ceiling_leaves_an_idle_worker_open(shop):
    order = bands(b.Band(), b.Band(ceiling=0.01))
    sim = shop(b.FlowControl(order, rooms=[b.FixedRoom(requests=2)]))
    sim.arrive(priority=1, id="batch")
    assert sim.sent == ["batch"]


def test_an_overdue_request_does_not_wait_for_hold_back(shop):
    order = bands(b.Band(), b.Band(ceiling=0.5, max_wait=5.0), every=1)
    sim = shop(b.FlowControl(order, rooms=[b.FixedRoom(requests=2)]), places=8)
    sim.arrive(priority=1)
    sim.arrive(priority=1, id="overdue")
    assert "overdue" not in sim.sent
    sim.wait(5.0)
    assert "overdue" in sim.sent


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["arrive", "arrive", "serve", "wait"]),
            st.integers(0, 2),
            st.floats(0.1, 3.0),
        ),
        min_size=10,
        max_size=120,
    ),
    st.integers(1, 5),
)
def test_no_request_waits_beyond_its_bands_bound(shop, actions, every):
    max_wait = [20.0, 5.0, 2.0]
    of = [b.Band(order=b.Vtc(), max_wait=wait) for wait in max_wait]
    sim = shop(bands(*of, every=every), places=2)
    left: dict[str, int] = {}  # dispatches until an overdue request must be gone

    def due(id):
        request = sim.requests[id]
        return request.arrived_at + max_wait[request.priority]

    def look(sent_before):
        dispatched = sim.sent[sent_before:]
        for id in list(left):
            left[id] -= len(dispatched)
            if id in dispatched:
                del left[id]
            else:
                assert left[id] > 0
        overdue = [id for id in sim.waiting if due(id) <= sim.now]
        for id in overdue:
            ahead = sum(due(other) <= due(id) for other in overdue)
            left.setdefault(id, every * ahead)

    for act, priority, seconds in actions:
        sent = len(sim.sent)
        if act == "arrive":
            sim.arrive("ab"[priority % 2], 5, priority=priority)
        elif act == "serve" and sim.where:
            sim.end(next(iter(sim.where)))
        else:
            sim.wait(seconds)
        look(sent)


def test_the_flood_above_loses_one_part_in_every(shop):
    order = bands(b.Band(name="chat"), b.Band(name="batch", max_wait=1.0), every=4)
    sim = shop(order, places=1)
    for _ in range(30):
        sim.arrive("chat", priority=0)
        sim.arrive("batch", priority=1)
    sim.wait(2.0)
    start = len(sim.sent)
    for _ in range(20):
        sim.end(next(iter(sim.where)))
    sent = sim.sent[start:]
    assert sum(id.startswith("batch") for id in sent) == 5


def test_a_full_band_refuses_and_others_do_not(shop):
    order = bands(b.Band(name="chat"), b.Band(name="batch", max_requests=1))
    sim = shop(order, places=1)
    sim.arrive(priority=1)
    sim.arrive(priority=1)
    full = sim.arrive(priority=1)
    assert isinstance(sim.failed[full], Rejected)
    assert "band batch full: 2 > 1 requests" in sim.failed[full].reason
    assert sim.arrive(priority=0) not in sim.failed


def test_a_band_counts_prompt_tokens_and_tells_its_pace(shop):
    order = bands(b.Band(name="all", max_tokens=100))
    sim = shop(order, places=1)
    for _ in range(4):
        sim.now += 2.0
        sim.end(sim.arrive(prompt=80))
    sim.arrive(prompt=80)
    sim.arrive(prompt=80)
    full = sim.arrive(prompt=21)
    assert sim.failed[full].retry_after == pytest.approx(1.5, abs=0.6)
    assert sim.arrive(prompt=20) not in sim.failed
    sim.drain()
    assert order.of[0].waiting_tokens == 0


def test_who_becomes_overdue_goes_with_the_very_next_dispatch(shop):
    bands = [b.Band(name="chat"), b.Band(name="batch", max_wait=3.0)]
    sim = shop(b.Bands(bands, every=1), places=1)
    sim.arrive(id="running")
    sim.arrive(priority=1, id="batch")
    sim.arrive(id="chat")
    sim.now = 5.0
    sim.end("running")
    assert sim.sent == ["running", "batch"]


def test_sheddable_work_makes_place_and_waits_again_in_front(shop):
    sim = shop(bands(), places=1)
    sim.arrive(priority=1, sheddable=True, id="first batch")
    sim.arrive(priority=1, sheddable=True, id="second batch")
    sim.arrive(priority=0, id="chat")
    assert sim.shed == ["first batch"]
    assert sim.where.keys() == {"chat"}
    assert sim.drain() == ["chat", "first batch", "second batch"]
    assert not sim.failed


def test_nothing_streamed_is_ever_shed(shop):
    sim = shop(bands(), places=1)
    sim.token(sim.arrive(priority=1, sheddable=True, id="batch"))
    sim.arrive(priority=0, id="chat")
    assert sim.shed == []
    assert sim.waiting == ["chat"]


def test_what_can_be_resumed_is_shed_after_it_streamed(shop):
    sim = shop(bands(), places=1)
    sim.token(sim.arrive(priority=1, sheddable=True, resumable=True, id="batch"))
    sim.arrive(priority=0, id="chat")
    assert sim.shed == ["batch"]
    assert sim.drain() == ["chat", "batch"]
    assert not sim.cluster.view.workers.loads.any()


def test_equals_are_not_shed_nor_what_is_not_sheddable_nor_overdue(shop):
    order = bands(b.Band(), b.Band(max_wait=3.0))
    sim = shop(order, places=2)
    sim.arrive(priority=1, id="not sheddable")
    sim.arrive(priority=1, sheddable=True, id="sheddable")
    sim.arrive(priority=1, id="equal")
    assert sim.shed == []
    sim.now = 4.0
    sim.arrive(priority=0, id="chat")
    assert sim.shed == []


def test_nothing_is_shed_in_vain(shop):
    # The place is closed by the prompt budget, not by who runs.
    rooms = [b.PromptBudget(tokens=10.0, window_s=1.0)]
    sim = shop(b.FlowControl(bands(), rooms=rooms), places=2)
    sim.arrive(prompt=50, priority=1, sheddable=True, id="batch")
    sim.arrive(prompt=5, priority=0, id="chat")
    assert sim.shed == []
    assert sim.where.keys() == {"batch"}
    assert sim.cluster.view.workers.prefill_tokens.tolist() == [50]


def test_what_has_answered_is_as_it_was_if_it_is_not_shed(shop):
    rooms = [b.PromptBudget(tokens=10.0, window_s=1.0)]
    sim = shop(b.FlowControl(bands(), rooms=rooms), places=2)
    batch = {"priority": 1, "sheddable": True, "resumable": True}
    sim.token(sim.arrive(prompt=50, id="batch", **batch))
    before = sim.cluster.view.workers.loads.copy()
    sim.arrive(prompt=5, priority=0, id="chat")
    assert sim.shed == []
    assert (sim.cluster.view.workers.loads == before).all()
    sim.end("batch")
    sim.cancel("chat")
    assert not sim.cluster.view.workers.loads.any()


def test_the_router_chooses_who_makes_place(shop):
    sim = shop(bands(), places=2, workers=3)
    batch = {"priority": 1, "sheddable": True}
    # Two on each worker, and the least to compute is on that of "0.small".
    for row, tokens in enumerate([4000, 3000, 2000, 4000, 3000, 10]):
        sim.arrive(prompt=tokens, id=f"{row}", **batch)
    where = dict(sim.where)
    before = sim.cluster.view.workers.running_requests.tolist()
    sim.arrive(prompt=100, priority=0, id="chat")
    [shed] = sim.shed
    assert sim.where["chat"] == where[shed]
    left = dict.fromkeys(where.values(), 0)
    for id, tokens in zip(where, [4000, 3000, 2000, 4000, 3000, 10], strict=True):
        # The newest of each worker is the one that would go.
        newest = [other for other in where if where[other] == where[id]][-1]
        left[where[id]] += 0 if id == newest else tokens
    assert left[where[shed]] == min(left.values())
    assert sim.cluster.view.workers.running_requests.tolist() == before


def test_shedding_uses_up_no_attempts(shop):
    sim = shop(bands(), places=1)
    sim.cluster.max_attempts = 2
    sim.arrive(priority=1, sheddable=True, id="batch")
    for number in range(5):
        sim.arrive(priority=0, id=f"chat{number}")
        sim.end(f"chat{number}")
    assert sim.shed == ["batch"] * 5
    assert sim.drain() == ["batch"]


@pytest.mark.parametrize("ceiling", [0.0, 1.5, -1.0])
def test_a_ceiling_is_a_part(ceiling):
    with pytest.raises(PolicyError):
        b.Band(ceiling=ceiling)


def test_no_bands_are_no_balancer():
    with pytest.raises(PolicyError):
        b.Bands([])
