"""The formulas, against the table they were derived with."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd.errors import InvalidSlice
from llmd.timeslice import choose_quantum, quantum_cap, quantum_for_overhead

# Switch seconds; turns for a waste of 5, 10 and 20 %; longest turns of three
# engines for a wait of 1 and 2 s, None where there is none.
TABLE = [
    (0.020, (0.38, 0.18, 0.08), (0.47, 0.97)),
    (0.060, (1.14, 0.54, 0.24), (0.41, 0.91)),
    (0.350, (6.65, 3.15, 1.40), (None, 0.475)),
    (0.650, (12.35, 5.85, 2.60), (None, 0.025)),
]


@pytest.mark.parametrize(("switch_s", "paying", "caps"), TABLE)
def test_the_table(switch_s, paying, caps):
    for overhead, seconds in zip((0.05, 0.1, 0.2), paying, strict=True):
        assert quantum_for_overhead(switch_s, overhead) == pytest.approx(seconds)
    for wait_s, seconds in zip((1.0, 2.0), caps, strict=True):
        cap = quantum_cap(switch_s, wait_s, 3)
        if seconds is None:
            assert cap <= 0
        else:
            assert cap == pytest.approx(seconds)


def test_one_engine_never_waits():
    assert quantum_cap(0.5, 1.0, 1) == math.inf


@pytest.mark.parametrize("overhead", [0.0, 1.0, -0.1, math.nan])
def test_a_waste_must_be_a_part(overhead):
    with pytest.raises(InvalidSlice):
        quantum_for_overhead(0.1, overhead)


@given(
    st.lists(
        # Nothing can be a part of the smallest switch that a float can hold.
        st.tuples(st.floats(0.25, 4.0), st.floats(0.0, 1.0, allow_subnormal=False)),
        min_size=1,
        max_size=6,
    ),
    st.floats(0.01, 0.5),
    st.floats(0.05, 60.0),
)
def test_what_is_chosen_keeps_what_it_says(engines, overhead, max_wait_s):
    weights, switches = zip(*engines, strict=True)
    chosen = choose_quantum(weights, switches, overhead, max_wait_s)
    turns = [chosen.seconds * weight / min(weights) for weight in weights]
    wastes = [s / (s + q) for s, q in zip(switches, turns, strict=True) if s]
    assert max(wastes, default=0.0) == pytest.approx(chosen.overhead)
    waits = [
        sum(turns) - own + (sum(switches) if len(engines) > 1 else switches[0])
        for own in turns
    ]
    assert max(waits) == pytest.approx(chosen.wait_s)
    meets = max(wastes, default=0.0) <= overhead * 1.000001
    meets &= len(engines) < 2 or max(waits) <= max_wait_s * 1.000001
    assert chosen.feasible == meets or min(
        abs(max(waits) - max_wait_s), abs(max(wastes, default=0.0) - overhead)
    ) == pytest.approx(0.0, abs=1e-6)
    assert 1 <= chosen.engines_that_fit <= len(engines)


@pytest.mark.parametrize(
    ("weights", "switches_s", "max_wait_s"),
    [
        ([1, 1], [-1, 0.1], 2.0),
        ([1, 1], [math.nan, 0.1], 2.0),
        ([1, 1], [math.inf, 0.1], 2.0),
        ([1, math.nan], [0.1, 0.1], 2.0),
        ([1, math.inf], [0.1, 0.1], 2.0),
        ([1, 0], [0.1, 0.1], 2.0),
        ([1, 1], [0.1, 0.1], math.nan),
        ([1], [0.1, 0.1], 2.0),
        ([], [], 2.0),
    ],
)
def test_what_is_no_time_and_no_weight_is_refused(weights, switches_s, max_wait_s):
    with pytest.raises(InvalidSlice):
        choose_quantum(weights, switches_s, 0.1, max_wait_s)


def test_a_quantum_is_not_made_of_nonsense():
    with pytest.raises(InvalidSlice):
        quantum_for_overhead(-0.1, 0.1)
    with pytest.raises(InvalidSlice):
        quantum_cap(math.nan, 1.0, 3)
    with pytest.raises(InvalidSlice):
        quantum_cap(0.1, math.nan, 3)
