"""Parameters that make no sense are refused when they are given, by name."""

import math
from functools import partial

import numpy as np
import pytest

from llmd import balancer as b
from llmd.errors import PolicyError

NAN = math.nan
BAD = [
    (b.RateLimit, "tokens_per_min", [0, -5, NAN, "many"]),
    (b.RateLimit, "requests_per_min", [0, NAN]),
    (b.RateLimit, "burst_s", [0, math.inf]),
    (b.RateLimit, "max_tenants", [0]),
    (b.Saturation, "max_wait_s", [0, NAN]),
    (b.Saturation, "stale_s", [NAN, -1]),
    (b.QueueFull, "requests", [-1, NAN]),
    (b.QueueFull, "tokens", [-1, NAN]),
    (b.DeadlineInfeasible, "margin", [NAN, 0]),
    (b.Drr, "quantum", [0, NAN]),
    (b.Dlpm, "quantum", [0, NAN]),
    (b.D2lpm, "worker_quantum", [0]),
    (b.Las, "half_life", [0]),
    (b.Vtc, "prompt_weight", [-1, NAN]),
    (b.Vtc, "output_weight", [-1, NAN]),
    (b.PromptBudget, "window_s", [0]),
    (b.PromptBudget, "tokens", [0, NAN]),
    (b.Band, "max_requests", [-1, True]),
    (b.Band, "max_wait", [NAN, -1]),
    (b.Band, "max_tokens", [NAN]),
    (b.Band, "ceiling", [0, 1.5, NAN]),
    (partial(b.Bands, [b.Band()]), "every", [0]),
    (b.Fcfs, "max_running", [-1, NAN]),
    (b.Fcfs, "max_waiting", [-1]),
    (b.ShortestPrefill, "ageing_tokens_per_s", [NAN, -1]),
    (b.Edf, "margin_s", [NAN]),
    (b.SlowStart, "ramp", [NAN]),
    (b.SlowStart, "first", [0]),
    (b.FixedRoom, "requests", [0, NAN]),
    (b.FixedRoom, "prefill_tokens", [0, NAN]),
    (b.FixedRoom, "kv_usage", [0, NAN]),
    (b.AimdRoom, "samples", [0]),
    (b.AimdRoom, "window_s", [0]),
    (b.LongPrefillCap, "spare", [1.5, NAN]),
    (b.LongPrefillCap, "at_once", [0]),
    (b.Accounts, "most", [0]),
    (b.FlowControl, "rooms", [[3], [b.QueueFull()]]),
    (b.FlowControl, "gates", [[b.FixedRoom()], [b.QueueFull]]),
    (b.FlowControl, "order", [b.Vtc, None]),
    (b.Vtc, "order", [b.Fcfs]),
    (b.Band, "order", [b.Fcfs]),
]


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [(make, name, value) for make, name, values in BAD for value in values],
)
def test_it_is_refused_by_name(make, name, value):
    with pytest.raises(PolicyError, match=name):
        make(**{name: value})


@pytest.mark.parametrize("weights", [{"t": 0}, {"t": NAN}, {"t": "much"}])
def test_weights_are_positive(weights):
    for make in (b.RateLimit, b.Vtc):
        with pytest.raises(PolicyError, match="'t'"):
            make(weights=weights)


def test_a_class_stands_for_no_band():
    with pytest.raises(PolicyError, match="order"):
        b.Bands([b.Vtc])


def test_edges_are_taken():
    b.Dlpm(quantum=1e15)
    b.QueueFull(requests=math.inf, tokens=0)
    b.Band(max_wait=0, max_requests=0, ceiling=1)
    b.Fcfs(max_running=np.int64(3))
    b.Fcfs(max_running=0)
    b.FixedRoom(requests=1, kv_usage=np.float32(0.5))
    b.Vtc(prompt_weight=0, output_weight=0)
    b.LongPrefillCap(spare=1)
