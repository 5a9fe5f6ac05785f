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


@pytest.mark.parametrize(
    ("number", "loads", "most"),
    [(3, 8, 1), (5, 11, 0), (6, 2, 0), (8, 2, 0), (9, 11, 1)],
)
def test_loads_are_simulated_as_measured_after_their_probe(number, loads, most):
    rows = _modelled.again(GPU, kept(number), kept(number))
    assert len(rows) == loads
    found, beyond = errors(rows)
    assert beyond <= most, _modelled.summed(rows)
    assert np.median(found["e2e"]) < 0.03
    assert max(found["e2e"].max(), found["tpot"].max()) < 0.08
    for row in rows:
        assert row["sim"]["hit_rate"] == pytest.approx(
            row["live"]["hit_rate"], abs=0.01
        )
        assert row["sim"]["completed"] == row["live"]["completed"]


def test_docs_say_what_was_off_where_the_host_was_slow_meanwhile():
    """The fourth start's first probe was, and shared prefixes of the sixth start."""
    for number, most in (4, 8), (7, 3):
        rows = _modelled.again(GPU, kept(number), kept(number))
        assert errors(rows)[1] == most, _modelled.summed(rows)


@pytest.mark.parametrize(
    ("number", "probe", "most"),
    [
        (1, 3, 3),
        (2, 3, 1),
        (4, 3, 1),
        (5, 3, 0),
        (9, 3, 4),
        (1, 5, 2),
        (2, 5, 1),
        (3, 5, 3),
        (4, 5, 3),
        (7, 5, 1),
        (9, 5, 1),
    ],
)
def test_a_probe_is_good_for_another_start_of_its_machine(number, probe, most):
    rows = _modelled.again(GPU, kept(number), kept(probe))
    found, beyond = errors(rows)
    assert beyond <= most, _modelled.summed(rows)
    assert max(found["e2e"].max(), found["tpot"].max()) <= 0.12


def test_what_is_printed_counts_what_is_within_bounds():
    live = {"tpot": 1.0, "e2e": 1.0, "ttft_p50": 1.0, "ttft_p99": 1.0, "hit_rate": 0.5}
    sim = {**live, "tpot": 1.2, "ttft_p50": 0.9}
    row = {"workload": "batch", "load": 0.3, "live": live, "sim": sim}
    assert _modelled.summed([row]).startswith("3 of 4 figures")
    assert "tpot 1000.0/1200.0 ms (+20%)" in _modelled.told(row)
