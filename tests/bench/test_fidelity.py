"""What the simulator makes of the loads that were measured on an H200."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import _modelled
from _sites import GPU

DATA = Path(__file__).parents[1] / "data"


def kept(number):
    return json.loads((DATA / f"h200_cells_{number}.json").read_text())


def errors(rows):
    """Return the errors of all rows, and how many are beyond their bounds."""
    found = {
        name: np.array([abs(row["sim"][name] / row["live"][name] - 1) for row in rows])
        for name in _modelled.WITHIN
    }
    beyond = sum(int((found[n] > most).sum()) for n, most in _modelled.WITHIN.items())
    return found, beyond


def test_loads_are_simulated_as_measured_after_a_probe_of_half_a_minute():
    rows = _modelled.again(GPU, kept(3), kept(3))
    found, beyond = errors(rows)
    assert beyond == 0, _modelled.summed(rows)
    assert np.median(found["e2e"]) < 0.03
    for row in rows:
        assert row["sim"]["hit_rate"] == pytest.approx(
            row["live"]["hit_rate"], abs=0.01
        )
        assert row["sim"]["completed"] == row["live"]["completed"]


@pytest.mark.parametrize(("number", "cells"), [(1, 12), (2, 11)])
def test_a_probe_is_good_for_another_start_of_its_machine(number, cells):
    rows = _modelled.again(GPU, kept(number), kept(3))
    assert len(rows) == cells
    found, beyond = errors(rows)
    assert beyond <= 2, _modelled.summed(rows)
    assert max(found["e2e"].max(), found["tpot"].max()) <= 0.1


def test_what_is_printed_counts_what_is_within_bounds():
    live = {"tpot": 1.0, "e2e": 1.0, "ttft_p50": 1.0, "ttft_p99": 1.0, "hit_rate": 0.5}
    sim = {**live, "tpot": 1.2, "ttft_p50": 0.9}
    row = {"workload": "batch", "load": 0.3, "live": live, "sim": sim}
    assert _modelled.summed([row]).startswith("3 of 4 figures")
    assert "tpot 1000.0/1200.0 ms (+20%)" in _modelled.told(row)
