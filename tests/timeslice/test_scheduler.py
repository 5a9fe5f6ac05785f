"""What a quantum scheduler promises, on modelled GPUs."""

import itertools
import math

import attrs
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from llmd.errors import InvalidSlice, PolicyError
from llmd.sim.gpu import Job, SimGpu
from llmd.timeslice import (
    Asked,
    FairShare,
    FifoLock,
    GpuArbiter,
    GpuView,
    QuantumScheduler,
    Slot,
    Turn,
)

from .conftest import STEP_S, endless, run, worker

weights = st.lists(st.floats(0.5, 4.0), min_size=2, max_size=4)
# Runs are long, so a failing one is shown as it was found.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
slow_example = settings(max_examples=20, deadline=None, phases=PHASES)


def slots(workers):
    return tuple(
        Slot(
            engine=one.name,
            weight=one.sharer.weight,
            requests=1,
            usual_switch_s=one.sharer.pause_s + one.sharer.resume_s,
        )
        for one in workers
    )


@slow_example
@given(weights, st.floats(0.0, 0.1), st.sampled_from([0.05, 0.1, 0.2]))
def test_shares_waste_and_gaps_of_busy_engines(weights, switch_s, overhead):
    workers = [
        worker(str(row), endless(), weight=weight, switch_s=switch_s)
        for row, weight in enumerate(weights)
    ]
    policy = QuantumScheduler(overhead=overhead)
    view = GpuView(now=0.0, rng=None, slots=slots(workers))
    round_s = sum(
        policy.turn_s(slot, view) + slot.usual_switch_s for slot in view.slots
    )
    report = run(QuantumScheduler(overhead=overhead), workers, until=20 * round_s)
    # The first round counts too, so the last may be short by one turn.
    for one, share in zip(workers, report.shares().values(), strict=True):
        assert share == pytest.approx(one.sharer.weight / sum(weights), rel=0.05)
        bound = policy.gap_bound_s(one.name, view, step_s=2 * STEP_S)
        assert max(report.gaps(one.name)) <= bound
    assert report.utilisation >= 1 - overhead - STEP_S / round_s


class Watched(QuantumScheduler):
    """Checks each preemption as it is decided."""

    preemptions = 0

    def next(self, view):
        turn = super().next(view)
        if view.running and turn.engine != view.running:
            own, other = view.slot(view.running), view.slot(turn.engine)
            cut = self._allowed - self._used(view.turn_s, view) > 1e-6
            if own.requests and cut:
                assert other.band < own.band
                assert view.turn_s >= self.min_turn_s - 1e-6
                Watched.preemptions += 1
        return turn


@slow_example
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2), st.floats(0.1, 20.0), st.integers(-2, 2), st.floats(0, 2)
        ),
        min_size=5,
        max_size=40,
    ),
    st.lists(st.integers(-1, 1), min_size=3, max_size=3),
)
def test_only_a_higher_band_preempts_and_shares_stay(urgent, bands):
    Watched.preemptions = 0
    jobs = [endless(priority=band) for band in bands]
    for engine, at, band, due in sorted(urgent, key=lambda one: one[1]):
        jobs[engine].append(
            Job(
                arrived_at=at,
                prompt_tokens=16,
                new_tokens=8,
                priority=band,
                deadline=at + due,
            )
        )
    workers = [worker(name, jobs[row]) for row, name in enumerate("abc")]
    report = run(Watched(overhead=0.1, quantum_s=0.4), workers, until=40.0)
    # A band buys promptness, never more time.
    for share in report.shares().values():
        assert share == pytest.approx(1 / 3, rel=0.1)
    view = GpuView(
        now=0.0,
        rng=None,
        slots=tuple(attrs.evolve(s, band=n) for n, s in enumerate(slots(workers))),
    )
    policy = QuantumScheduler(overhead=0.1, quantum_s=0.4)
    bound = 2 * policy.gap_bound_s("a", view, step_s=2 * STEP_S)
    assert all(max(report.gaps(one.name)) <= bound for one in workers)


def test_an_urgent_request_is_served_within_the_bound():
    due = Job(
        arrived_at=10.1, prompt_tokens=16, new_tokens=4, priority=-1, deadline=10.4
    )
    workers = [
        worker("bulk", endless()),
        worker("more", endless()),
        worker("chat", [due], switch_s=0.02),
    ]
    policy = QuantumScheduler(quantum_s=3.0, min_turn_s=0.05)
    report = run(policy, workers, until=20.0)
    [ttft] = report.ttft_s["chat"]
    assert ttft <= policy.min_turn_s + 0.02 + 4 * STEP_S
    # Without a band it waits for its place in the ring.
    calm = [
        worker("bulk", endless()),
        worker("more", endless()),
        worker("chat", [attrs.evolve(due, priority=0)]),
    ]
    [waited] = run(QuantumScheduler(quantum_s=3.0), calm, until=20.0).ttft_s["chat"]
    assert waited > 1.0


def test_time_that_nobody_wanted_is_not_charged():
    late = [Job(arrived_at=10.0, prompt_tokens=16, new_tokens=10**9)] * 4
    workers = [worker("early", endless()), worker("late", late)]
    report = run(QuantumScheduler(overhead=0.1), workers, until=30.0)
    early = sum(t.run_s for t in report.turns if t.engine == "early")
    last = sum(t.run_s for t in report.turns if t.engine == "late")
    assert early - 10.0 == pytest.approx(last, rel=0.1)


def test_an_idle_engine_gives_way_at_once():
    short = [Job(arrived_at=0.0, prompt_tokens=16, new_tokens=10)]
    workers = [worker("a", short), worker("b", endless())]
    report = run(QuantumScheduler(quantum_s=5.0), workers, until=10.0)
    assert report.turns[0].engine == "a"
    assert report.turns[0].run_s < 0.1


def test_targets_that_exclude_each_other_are_complained_of():
    workers = [worker(name, endless(), switch_s=0.35) for name in "abc"]
    report = run(QuantumScheduler(overhead=0.1, max_wait_s=2.0), workers, until=5.0)
    said = report.complaints[-1]
    assert said.engines == 3
    assert said.engines_that_fit == 1
    assert "0.350 s to switch" in said.reason
    # Two turns of 0.475 s and three switches; one more of each if overtaken.
    assert "2.000 s in the ring, 2.825 s where another goes ahead" in said.reason
    assert "twice that for the next turn of who did" in said.reason
    calm = [worker(name, endless(), switch_s=0.06) for name in "abc"]
    assert not run(
        QuantumScheduler(overhead=0.1, max_wait_s=2.0), calm, until=5.0
    ).complaints


def test_a_complaint_speaks_of_the_turns_that_are_given():
    slots = tuple(Slot(engine=n, requests=1, usual_switch_s=0.35) for n in "abc")
    view = GpuView(now=0.0, rng=None, slots=slots)
    policy = QuantumScheduler(overhead=0.1, max_wait_s=2.0, quantum_s=1.0)
    said = policy.complaint(view).reason
    assert "turns of 1.000 s waste 26%" in said
    assert f"{policy.gap_bound_s('a', view):.3f} s in the ring" in said


def test_a_longer_wait_ends_the_complaint():
    jobs = [Job(arrived_at=0.0, prompt_tokens=16, new_tokens=50)]
    workers = [
        worker("a", endless(), switch_s=0.35),
        worker("b", jobs, switch_s=0.35),
        worker("c", jobs, switch_s=0.35),
    ]
    report = run(QuantumScheduler(overhead=0.1, max_wait_s=2.0), workers, until=20.0)
    assert report.complaints[0] is not None
    assert report.complaints[-1] is None


def test_a_turn_that_another_policy_gave_is_owed_to_nobody():
    workers = [worker(name, endless()) for name in "ab"]
    gpu = SimGpu(GpuArbiter(FifoLock()), workers)
    policy = QuantumScheduler(quantum_s=0.5)
    gpu._agenda.put(10.0, lambda _: setattr(gpu.arbiter, "policy", policy))
    # The lock is asked when something happens, which is here never.
    gpu._agenda.put(10.0, lambda _: gpu._tell(Asked(10.0)))
    turns = gpu.run(until=20.0).turns
    assert turns[0].run_s > 9.9
    assert all(turn.run_s < 0.6 for turn in turns[1:])
    engines = [turn.engine for turn in turns]
    assert all(one != other for one, other in itertools.pairwise(engines))


@pytest.mark.parametrize(
    ("policy", "field", "values"),
    [
        (QuantumScheduler, "quantum_s", (math.nan, -1.0, 0.0, 1e-300, math.inf, "1")),
        (QuantumScheduler, "min_turn_s", (math.nan, -1.0, 0.0, math.inf)),
        (QuantumScheduler, "max_wait_s", (math.nan, -1.0, 0.0)),
        (QuantumScheduler, "overhead", (math.nan, -1.0, 0.0, 1.0)),
        (FairShare, "quantum_s", (math.nan, -1.0, 0.0, math.inf)),
        (FifoLock, "linger_s", (math.nan, -1.0)),
    ],
)
def test_times_that_no_clock_measures_are_refused(policy, field, values):
    for value in values:
        with pytest.raises(InvalidSlice, match=field):
            policy(**{field: value})
        with pytest.raises(InvalidSlice, match=field):
            setattr(policy(), field, value)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, 1e-300])
def test_a_subclass_whose_turns_make_no_sense_is_named_and_ends(seconds):
    class Odd(QuantumScheduler):
        def turn_s(self, slot, view):
            return seconds

    workers = [worker(name, endless()) for name in "ab"]
    with pytest.raises(PolicyError, match="Odd raised InvalidSlice: the turn of 'a'"):
        run(Odd(), workers, until=1.0)


def test_a_great_debt_is_paid_at_once_and_in_full():
    view = GpuView(
        now=1e6,
        rng=None,
        slots=tuple(Slot(engine=name, requests=1) for name in "abc"),
    )
    policy = QuantumScheduler(quantum_s=1e-6, min_turn_s=1e-6)
    policy._enlist(view)
    policy._deficits.update(a=-1e6, b=-2e6, c=-1e6 + 1e-6)
    assert policy.next(view).engine == "c"
    assert policy._deficits["b"] - policy._deficits["a"] == pytest.approx(-1e6)
    assert abs(policy._deficits["a"]) < 1e-5
    assert policy._ring == ["a", "b", "c"]


def eighths(least, most):
    return st.integers(least, most).map(lambda n: n / 8)


@given(
    st.lists(eighths(-160, 8), min_size=1, max_size=4),
    eighths(1, 16),
    eighths(1, 8),
    st.sets(st.sampled_from("abcd")),
)
def test_rounds_added_up_are_rounds_gone_one_by_one(debts, quantum_s, min_turn_s, cut):
    # In eighths, sums are exact in whatever order.
    deficits = dict(zip("abcd", debts, strict=False))
    slots = tuple(Slot(engine=name, requests=1) for name in deficits)
    policy = QuantumScheduler(quantum_s=quantum_s, min_turn_s=min_turn_s)
    view = GpuView(now=0.0, rng=None, slots=slots)
    policy._enlist(view)
    policy._deficits.update(deficits)
    policy._cut = cut & set(deficits)
    waiting = set(cut)
    for name in itertools.cycle(deficits):
        if name in waiting:
            waiting.remove(name)
        else:
            deficits[name] = min(deficits[name], quantum_s) + quantum_s
        if deficits[name] >= min(min_turn_s, quantum_s / 2):
            break
    assert policy.next(view) == Turn(name, deficits[name])
    assert policy._deficits == deficits
    assert policy._cut == waiting & set(deficits)
