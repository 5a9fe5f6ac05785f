"""Steps whose launch the host prepares, against the engine's loop spelled out."""

import attrs
import hypothesis.strategies as st
import pytest
from hypothesis import given

from llmd import Machine
from llmd.sim.pace import WARMING_S, Pace
from llmd.sim.steps import Run

MACHINE = Machine(host_s=3e-3)
HOST_S, LAUNCH_S = 3e-3, 11e-3
seconds = st.floats(1e-4, 0.05)


def loop(steps):
    """Return when the outcome of each of *steps* is seen: (GPU seconds, prompts)."""
    busy = [LAUNCH_S if prompts else HOST_S for _, prompts in steps]
    seen, done, launched = [], 0.0, busy[0]
    for number, (gpu_s, prompts) in enumerate(steps):
        if number == 0:
            done = gpu_s
        elif prompts:
            done = max(done + gpu_s, launched)
        else:
            done = max(done, launched) + gpu_s
        if number + 1 == len(steps):
            seen.append(done)
            continue
        # The next is launched now, and only then is this one looked at.
        begun = seen[-1] if seen else launched
        launched = begun + busy[number + 1]
        seen.append(max(done, launched))
    return seen


@given(st.lists(st.tuples(seconds, st.booleans()), min_size=1, max_size=12))
def test_steps_end_as_in_the_loop_of_an_engine(steps):
    pace, now, ends = Pace(MACHINE, ahead=True), 0.0, []
    for number, (gpu_s, prompts) in enumerate(steps):
        pace.begin(now)
        assert pace.ready == (number > 0)
        own, *more = [LAUNCH_S if p else HOST_S for _, p in steps[number:]]
        run = Run(now, 1, gpu_s)
        pace.run(run, own, more[0] if more else 0.0, prompts)
        pace.ended(run, 0.0)
        now = run.end
        ends.append(now)
    assert ends == pytest.approx(loop(steps))


def test_an_engine_that_rested_has_launched_nothing():
    pace = Pace(MACHINE, ahead=True)
    pace.begin(0.0)
    run = Run(0.0, 1, 0.02)
    pace.run(run, LAUNCH_S, HOST_S, prompts=True)
    pace.ended(run, 0.0)
    pace.begin(run.end + 1e-3)
    assert not pace.ready
    pace.begin(run.end, rested=True)
    assert not pace.ready


@pytest.mark.parametrize("ahead", [True, False])
def test_an_engine_that_launches_nothing_ahead_takes_what_its_steps_take(ahead):
    machine = MACHINE if not ahead else attrs.evolve(MACHINE, host_s=0.0)
    pace, now = Pace(machine, ahead=ahead), 0.0
    for gpu_s in (0.005, 0.02, 0.005):
        pace.begin(now)
        assert not pace.ready
        run = Run(now, 1, gpu_s)
        pace.run(run, LAUNCH_S, LAUNCH_S, prompts=True)
        assert run.end == now + gpu_s
        pace.ended(run, 0.0)
        now = run.end


def test_a_gpu_gets_warm_with_prompts_and_cools_without():
    pace = Pace(attrs.evolve(MACHINE, hot_slowdown=0.2), ahead=False)
    pace.begin(0.0)
    run = Run(0.0, 1, 3 * WARMING_S)
    pace.ended(run, 3 * WARMING_S)
    warm = pace.heat
    assert 0.9 < warm < 1.0
    pace.begin(run.end)
    assert pace.heat == warm
    pace.begin(run.end + WARMING_S)
    assert pace.heat == pytest.approx(warm / 2.718, rel=1e-3)


def test_heat_does_not_depend_on_how_often_one_looks():
    one, many = (Pace(attrs.evolve(MACHINE, hot_slowdown=0.2), False) for _ in "ab")
    one.ended(Run(0.0, 10, 0.02), 0.1)
    for number in range(10):
        many.ended(Run(number * 0.02, 1, 0.02), 0.01)
    assert one.heat == pytest.approx(many.heat)
