"""What the probe of real engines makes of the times it sees."""

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import _engine_probe


@pytest.mark.parametrize("told_late_s", [0.0, 0.012])
def test_the_step_of_a_prompt_is_found_whichever_gap_it_shows_in(told_late_s):
    """Steps of 5 ms, one of 30; the outcome before it may be told late."""
    steps = [0.005] * 20 + [0.030] + [0.005] * 20
    times = list(itertools.accumulate(steps))
    asked, came = times[18] + 0.002, times[20]
    times[19] += told_late_s
    found = _engine_probe.longer(times, asked, came, 1)
    assert found == pytest.approx(0.030)
    assert max(b - a for a, b in itertools.pairwise(times)) == pytest.approx(
        0.030 - told_late_s
    )


def test_several_prompts_are_told_by_their_sum():
    """Steps of 5 ms; three of 20, 30 and 40 among them."""
    steps = [0.005] * 20 + [0.020] + [0.005] * 3 + [0.030, 0.040] + [0.005] * 20
    times = list(itertools.accumulate(steps))
    found = _engine_probe.longer(times, times[18] + 0.002, times[25], 3)
    assert found == pytest.approx(0.030)


def test_a_launch_is_the_longest_gap_and_the_next():
    """Decoding at 5 ms; 11 to launch a prompt, 3 for the step behind it."""
    gaps = [0.005] * 20 + [0.011, 0.003, 0.0045] + [0.005] * 20
    times = list(itertools.accumulate(gaps))
    found = _engine_probe.launch(times, times[18] + 0.002, times[21])
    assert found == pytest.approx((0.011, 0.003))


def test_a_line_is_not_bent_by_a_few_late_ones():
    rests = [(tokens, 2e-3 + 3e-7 * tokens) for tokens in range(100, 9000, 300)]
    rests[3], rests[20] = (rests[3][0], 0.5), (rests[20][0], 0.2)
    base, each = _engine_probe.line(rests)
    assert base == pytest.approx(2e-3)
    assert each == pytest.approx(3e-7)


def test_an_intake_that_seems_to_fall_with_tokens_is_a_constant():
    base, each = _engine_probe.line([(10, 2e-3), (500, 1.5e-3), (1000, 1e-3)])
    assert (base, each) == (pytest.approx(1.5e-3), 0.0)
