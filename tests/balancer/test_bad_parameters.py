"""Parameters that make no sense are refused when they are given, by name."""

import math
from functools import partial

import numpy as np
import pytest

import llmd
from llmd import balancer as b
from llmd.errors import PolicyError
from llmd.machines import Machine

NAN = math.nan
BAD = [
    (b.RateLimit, "tokens_per_min", [0, -5, NAN, "many"]),
    (b.RateLimit, "requests_per_min", [0, NAN, True, 0.5]),
    (b.RateLimit, "weights", [{"t": 0}, {"t": NAN}, {"t": "much"}, {"t": True}, 3]),
    (b.RateLimit, "burst_s", [0, math.inf]),
    (b.RateLimit, "max_tenants", [0]),
    (b.Saturation, "max_wait_s", [0, NAN]),
    (b.Saturation, "stale_s", [NAN, -1]),
    (b.QueueFull, "requests", [-1, NAN]),
    (b.QueueFull, "tokens", [-1, NAN]),
    (b.DeadlineInfeasible, "margin", [NAN, 0, 10**400]),
    (b.DeadlineInfeasible, "router", [llmd.LeastDelay, None]),
    (b.DeadlineInfeasible, "machine", [Machine]),
    (b.Saturation, "machine", [Machine]),
    (b.Drr, "quantum", [0, NAN]),
    (b.Dlpm, "quantum", [0, NAN]),
    (b.D2lpm, "worker_quantum", [0]),
    (b.Las, "half_life", [0]),
    (b.Vtc, "prompt_weight", [-1, NAN]),
    (b.Vtc, "output_weight", [-1, NAN]),
    (b.PromptBudget, "window_s", [0]),
    (b.PromptBudget, "tokens", [0, NAN, math.inf]),
    (b.Band, "max_requests", [-1, True]),
    (b.Band, "max_wait", [NAN, -1]),
    (b.Band, "max_tokens", [NAN]),
    (b.Band, "ceiling", [0, 1.5, NAN]),
    (partial(b.Bands, [b.Band()]), "every", [0, 1.5]),
    (b.Fcfs, "max_running", [-1, NAN]),
    (b.Fcfs, "max_waiting", [-1]),
    (b.ShortestPrefill, "ageing_tokens_per_s", [NAN, -1]),
    (b.Edf, "margin_s", [NAN]),
    (b.Edf, "machine", [Machine]),
    (b.SlowStart, "ramp", [0, NAN]),
    (b.SlowStart, "first", [0]),
    (b.FixedRoom, "requests", [0, NAN, 1.5]),
    (b.FixedRoom, "prefill_tokens", [0, NAN]),
    (b.FixedRoom, "kv_usage", [0, NAN]),
    (b.AimdRoom, "samples", [0]),
    (b.AimdRoom, "window_s", [0]),
    (b.LongPrefillCap, "spare", [1.5, NAN]),
    (b.LongPrefillCap, "at_once", [0]),
    (b.Accounts, "most", [0, NAN]),
    (b.FlowControl, "rooms", [[3], [b.QueueFull()]]),
    (b.FlowControl, "gates", [[b.FixedRoom()], [b.QueueFull]]),
    (b.FlowControl, "order", [b.Vtc, None]),
    (b.FlowControl, "accounts", [b.Accounts, 1000]),
    (b.Vtc, "order", [b.Fcfs]),
    (b.Vtc, "weights", [{"t": 0}, {"t": math.inf}]),
    (b.Band, "order", [b.Fcfs]),
    (b.Vtc, "weights", [{"t": 1e-320}]),
    (b.Vtc, "tenant", ["x", None]),
    (b.RateLimit, "tenant", [None]),
    (b.Accounts, "by", ["tenant"]),
    (b.Accounts, "weights", [{"t": 0}]),
    (partial(b.Bands, [b.Band()]), "band", [3]),
    (b.LongPrefillCap, "of", [3]),
    (b.WeightedShortest, "worth", [1]),
    (b.SloDeadline, "ttft_s", [-1, NAN, "fast"]),
    (b.Dlpm, "look", [2.5, -1]),
    (b.Las, "half_life", [1e-300]),
    (b.AimdRoom, "start", ["8", 32.5]),
    (b.AimdRoom, "lowest", [True]),
    (b.AimdRoom, "highest", [0]),
    (b.AimdRoom, "decrease", ["x", 0]),
]


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [(make, name, value) for make, name, values in BAD for value in values],
)
def test_it_is_refused_by_name(make, name, value):
    with pytest.raises(PolicyError, match=rf"\.{name}\b"):
        make(**{name: value})


def test_a_weight_that_never_holds_a_request_is_refused():
    b.RateLimit(requests_per_min=180.0, burst_s=1.0, weights={"t": 1 / 3})
    b.RateLimit(requests_per_min=60.0, burst_s=1.0, weights={"t": 2.0})
    with pytest.raises(PolicyError, match="requests_per_min"):
        b.RateLimit(requests_per_min=120.0, burst_s=1.0, weights={"t": 1 / 3})


def test_a_class_stands_for_no_band():
    with pytest.raises(PolicyError, match=r"\.order\b"):
        b.Bands([b.Vtc])


@pytest.mark.parametrize(
    "make",
    [
        lambda: b.Bands(3),
        lambda: b.Bands([b.Band(name="x"), b.Band(name="x")]),
        lambda: b.Bands([b.Band(name="1"), b.Band()]),
        lambda: b.Bands([band := b.Band(), band]),
        lambda: b.Band(name=5),
        lambda: b.FlowControl(gates=b.QueueFull()),
        lambda: b.FlowControl(rooms=b.FixedRoom()),
        lambda: b.Vtc(b.Bands([b.Fcfs()])),
        lambda: b.AimdRoom(decrease=1.0),
    ],
)
def test_what_cannot_be_meant_is_refused(make):
    with pytest.raises(PolicyError):
        make()


GOOD = [
    (b.Dlpm, "quantum", [1e15, np.float32(512)]),
    (b.QueueFull, "requests", [0, math.inf, 10**400]),
    (b.QueueFull, "tokens", [0, math.inf]),
    (b.RateLimit, "requests_per_min", [60, np.int64(90), math.inf]),
    (b.RateLimit, "tokens_per_min", [1e-3, math.inf]),
    (b.RateLimit, "max_tenants", [1, math.inf]),
    (b.Band, "max_wait", [0, math.inf]),
    (b.Band, "max_requests", [0, math.inf]),
    (b.Band, "ceiling", [1, np.float64(0.1)]),
    (b.Fcfs, "max_running", [None, 0, np.int64(3), math.inf]),
    (b.Fcfs, "max_waiting", [0, math.inf]),
    (b.FixedRoom, "requests", [None, 1, math.inf]),
    (b.FixedRoom, "kv_usage", [np.float32(0.5), math.inf]),
    (b.Vtc, "prompt_weight", [0]),
    (b.Vtc, "output_weight", [0]),
    (b.LongPrefillCap, "spare", [0, 1]),
    (b.LongPrefillCap, "at_once", [1, math.inf]),
    (b.Saturation, "max_wait_s", [math.inf]),
    (b.Accounts, "most", [1, math.inf]),
    (b.FlowControl, "accounts", [None]),
]


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [(make, name, value) for make, name, values in GOOD for value in values],
)
def test_edges_are_taken(make, name, value):
    assert getattr(make(**{name: value}), name) == value


@pytest.mark.parametrize(
    "control",
    [
        b.FlowControl(b.Fcfs(max_running=math.inf, max_waiting=math.inf)),
        b.FlowControl(b.Bands([b.Band(max_requests=math.inf)])),
        b.FlowControl(rooms=[b.FixedRoom(requests=math.inf)]),
        b.FlowControl(rooms=[b.LongPrefillCap(at_once=math.inf, long_tokens=1)]),
        b.FlowControl(gates=[b.RateLimit(max_tenants=math.inf)]),
    ],
    ids=str,
)
def test_without_a_limit_requests_run(shop, control):
    sim = shop(control, places=2)
    assert {sim.arrive("t", 30), sim.arrive("t", 30)} == {*sim.where}
