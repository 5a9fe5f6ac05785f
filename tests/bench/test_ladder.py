"""What the simulator makes of llm-d's ladders, of which one was not fitted to."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import _ladders
import ladder

OUTPUT, TAIL = 0, 2


@pytest.fixture(scope="module")
def held_out():
    """What was measured and simulated of three policies, shape (stages, figures)."""
    known = _ladders.HELD_OUT
    return {
        policy: (known.measured()[policy], np.array(ladder.climbed("37", policy, 1)))
        for policy in ("precise", "load", "random")
    }


def test_saturated_output_is_within_15_percent(held_out):
    high = np.array([*_ladders.HELD_OUT.stages]) >= _ladders.HELD_OUT.full
    for measured, simulated in held_out.values():
        apart = simulated[high, OUTPUT].mean() / measured[high, OUTPUT].mean() - 1
        assert abs(apart) < 0.15


def test_precise_is_ahead_at_every_rate_and_has_no_knee(held_out):
    _, precise = held_out["precise"]
    for policy in ("load", "random"):
        assert (precise[:, OUTPUT] > held_out[policy][1][:, OUTPUT]).all()
    assert ladder.knee(_ladders.HELD_OUT, precise[:, TAIL]) is None


def test_load_is_ahead_of_random_as_it_was_there(held_out):
    high = np.array([*_ladders.HELD_OUT.stages]) >= _ladders.HELD_OUT.full
    load, random = [held_out[policy] for policy in ("load", "random")]
    for kind in (0, 1):  # measured, simulated
        assert load[kind][high, OUTPUT].mean() > random[kind][high, OUTPUT].mean()


def test_random_breaks_down_where_it_did(held_out):
    for figures in held_out["random"]:
        assert ladder.knee(_ladders.HELD_OUT, figures[:, TAIL]) == 4
