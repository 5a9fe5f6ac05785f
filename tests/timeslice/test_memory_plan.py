"""Memory of engines that share a GPU: sums that come out, or are shown."""

import math

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd.errors import DoesNotFit, InvalidSlice
from llmd.machines import GH200_96, H200
from llmd.machines.hardware import GIB
from llmd.machines.shape import QWEN25_7B
from llmd.memory_plan import CONTEXT_BYTES, Need, plan_memory


def need(name, kv_tokens=200_000):
    return Need.of(name, QWEN25_7B, kv_tokens=kv_tokens, max_model_tokens=8192)


def test_two_7b_engines_share_a_gh200_by_the_sum_and_not_by_hand():
    plan = plan_memory(GH200_96, [need("a"), need("b")])
    fractions = [part.gpu_memory_utilization for part in plan.parts]
    assert sum(fractions) < 1
    assert plan["a"].options() == {
        "gpu_memory_utilization": fractions[0],
        "kv_cache_memory_bytes": 200_000 * 57_344,
        "max_model_len": 8192,
    }


def test_a_plan_that_cannot_fit_is_refused_with_its_sum():
    pair = [need("left", 1_000_000), need("right", 900_000)]
    with pytest.raises(DoesNotFit) as refused:
        plan_memory(GH200_96, pair)
    text = str(refused.value)
    assert "left: weights 14.18 GiB + KV 1000000 tokens x 57344 B = 53.41 GiB" in text
    assert "too much; they fit in turns" in text
    plan = plan_memory(GH200_96, pair, in_turns=True)
    assert plan["left"].options()["enable_sleep_mode"] is True


def test_not_even_in_turns():
    with pytest.raises(DoesNotFit, match="too much; they fit with"):
        plan_memory(GH200_96, [need("a", 2_000_000)])
    with pytest.raises(DoesNotFit, match=r"too much$"):
        plan_memory(GH200_96, [need("a", 2_000_000)], in_turns=True)


def test_a_cache_must_hold_the_longest_request():
    with pytest.raises(DoesNotFit, match="holds no request of 8192"):
        need("a", 8000)


def test_names_are_not_used_twice():
    with pytest.raises(InvalidSlice, match="one name"):
        plan_memory(H200, [need("a"), need("a")])
    with pytest.raises(InvalidSlice, match="no engine"):
        plan_memory(H200, [need("a")])["b"]


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf, 10**400, "1"])
@pytest.mark.parametrize(
    "field",
    [
        *("weights_bytes", "kv_bytes_per_token", "kv_tokens"),
        *("max_model_tokens", "activation_bytes"),
    ],
)
def test_sizes_that_are_none_are_refused_by_name(field, value):
    with pytest.raises(InvalidSlice, match=f"Need.{field} is"):
        attrs.evolve(need("a"), **{field: value})


def test_sizes_beyond_all_floats_do_not_fit():
    with pytest.raises(DoesNotFit, match="too much"):
        plan_memory(H200, [attrs.evolve(need("a"), kv_tokens=10**305)])


@given(
    st.lists(st.integers(8192, 3_000_000), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([H200, GH200_96]),
)
def test_what_is_planned_fits(tokens, in_turns, hardware):
    needs = [need(str(row), one) for row, one in enumerate(tokens)]
    try:
        plan = plan_memory(hardware, needs, in_turns=in_turns)
    except DoesNotFit:
        held = [one.awake_bytes for one in needs]
        most = max(held) if in_turns else sum(held)
        assert most + GIB * len(held) > hardware.memory_bytes * 0.97
        return
    shares = [
        part.gpu_memory_utilization * hardware.memory_bytes + CONTEXT_BYTES
        for part in plan.parts
    ]
    assert (max(shares) if in_turns else sum(shares)) <= hardware.memory_bytes
    assert plan.free_bytes >= 0
