"""What was timed, as machines and settings, and as a file."""

import json
from pathlib import Path

import attrs
import pytest

from llmd import Worker
from llmd.errors import InvalidHardware
from llmd.machines.fit import Step
from llmd.sim import Calibration
from llmd.sim.calibration import Probed, line

DATA = Path(__file__).parents[1] / "data" / "h200_cells_3.json"


@pytest.fixture(scope="module")
def found():
    return json.loads(DATA.read_text())[0]


def test_a_calibration_is_read_as_it_was_written(found, tmp_path):
    one = Calibration.of(found)
    one.save(tmp_path / "fleet.json")
    again = Calibration.load(tmp_path / "fleet.json")
    assert again == one
    assert again.machines == one.machines
    assert again.settings == one.settings
    assert "steps" in str(one)
    assert "us a token" in str(one)


def test_an_h200_has_a_host_and_gets_hot(found):
    machine = Calibration.of(found).machines["w0"]
    assert 1e-3 < machine.host_s < machine.graph_floor_s
    assert 0.02 < machine.hot_slowdown < 0.3
    assert machine.name == "w0"


def test_engines_have_machines_of_their_own(found):
    one = Calibration.of(found).engines[0]
    slower = [attrs.evolve(step, seconds=2 * step.seconds) for step in one.steps]
    other = Probed(
        worker=Worker(id="w1", machine="slow"), steps=tuple(slower), rests=one.rests
    )
    both = Calibration(engines=(one, other), step_tokens=2048, steps_ahead=1)
    fast, slow = both.machines["w0"], both.machines["slow"]
    assert slow.prefill_s(1500.0) == pytest.approx(2 * fast.prefill_s(1500.0), rel=0.1)
    assert slow.host_s == 0.0


@pytest.mark.parametrize("name", ["engines", "step_tokens", "graph_tokens"])
def test_what_is_missing_is_named(found, name):
    less = {key: value for key, value in found.items() if key != name}
    with pytest.raises(InvalidHardware, match=name):
        Calibration.of(less)


@pytest.mark.parametrize(
    "bad", [{"engines": []}, {"engines": 3}, {"engines": [{"id": "a"}]}]
)
def test_what_is_no_calibration_is_refused(found, bad):
    with pytest.raises(InvalidHardware):
        Calibration.of({**found, **bad})


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other"
    path.write_text("hello")
    with pytest.raises(InvalidHardware, match="no JSON"):
        Calibration.load(path)


def test_a_line_is_not_bent_by_a_few_late_ones():
    rests = [(tokens, 2e-3 + 3e-7 * tokens) for tokens in range(100, 9000, 300)]
    rests[3], rests[20] = (rests[3][0], 0.5), (rests[20][0], 0.2)
    assert line(rests) == pytest.approx((2e-3, 3e-7))


def test_what_seems_to_fall_with_tokens_is_a_constant():
    found = line([(10, 2e-3), (500, 1.5e-3), (1000, 1e-3)])
    assert found == (pytest.approx(1.5e-3), 0.0)


@pytest.mark.parametrize("same", ["id", "machine"])
def test_engines_of_one_name_are_refused(found, same):
    one = Calibration.of(found).engines[0]
    names = {"id": "w1", "machine": "other", same: "w0"}
    other = attrs.evolve(one, worker=Worker(**names))
    with pytest.raises(InvalidHardware, match=f"two engines have one {same}"):
        Calibration(engines=(one, other), step_tokens=2048, steps_ahead=1)


@pytest.mark.parametrize(
    "rests", [[[1, 2, 3]], [["a", 1.0]], [[1.0, -1.0]], [[1.0, float("nan")]], 3]
)
def test_rests_that_are_no_pairs_are_refused(found, rests):
    engine = {**found["engines"][0], "rests": rests}
    with pytest.raises(InvalidHardware):
        Calibration.of({**found, "engines": [engine]})


def test_what_the_engine_told_is_carried_over(found):
    more = {"by_priority": True, "kv_bytes_per_token": 1000.0, "weights_bytes": 1e6}
    one = Calibration.of({**found, **more})
    assert one.settings.by_priority
    assert one.machines["w0"].kv_bytes_per_token == 1000.0
    assert one.machines["w0"].weights_bytes == 1e6


def test_one_amount_tells_no_slope():
    assert line([(3, 1.0), (3, 2.0), (3, 3.0)]) == (2.0, 0.0)


def test_a_line_through_nothing_is_refused():
    with pytest.raises(InvalidHardware):
        line([])


def test_a_fleet_whose_intake_was_not_timed_is_refused():
    probed = Probed(worker=Worker(id="a"), steps=(Step(1, 0, 0, 0, 1.0),), rests=())
    with pytest.raises(InvalidHardware):
        Calibration(engines=(probed,), step_tokens=10, steps_ahead=0)
