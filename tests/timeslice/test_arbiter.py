"""The state machine of one GPU: order, memory, faults."""

import math

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd.errors import InvalidEvent, InvalidSlice, PolicyError
from llmd.sim.gpu import Job, SimGpu
from llmd.timeslice import (
    Action,
    Asked,
    Blame,
    Do,
    Done,
    Failed,
    FairShare,
    FifoLock,
    GpuArbiter,
    Joined,
    Left,
    Lost,
    QuantumScheduler,
    Sharer,
    TimeSlice,
    Turn,
    Wanted,
)

from .conftest import endless, run, worker

POLICIES = [
    lambda: QuantumScheduler(overhead=0.1),
    lambda: FairShare(quantum_s=0.3),
    FifoLock,
]


def finite(count=20):
    return [
        Job(arrived_at=0.1 * n, prompt_tokens=16, new_tokens=20) for n in range(count)
    ]


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=20, deadline=None)
@given(
    crash_at=st.floats(0.0, 4.0),
    fault=st.sampled_from(["crash", "broken", "stuck"]),
    action=st.sampled_from(Action),
    fitting=st.sampled_from([1, 2, 3]),
    prefetch=st.booleans(),
)
def test_a_fault_never_wedges_the_ring(
    policy, crash_at, fault, action, fitting, prefetch
):
    faults = {
        "crash": {"crashes": {"b": crash_at}},
        "broken": {"broken": {"b": action}},
        "stuck": {"stuck": {"b": action}},
    }[fault]
    workers = [worker(name, finite(), awake_bytes=10.0) for name in "abc"]
    run(
        policy(),
        workers,
        until=120.0,
        memory_bytes=10.0 * fitting,
        prefetch=prefetch,
        timeout_s=2.0,
        **faults,
    )
    for one in workers:
        if one.name != "b":
            assert one.ended == 20, f"{one.name} ended {one.ended}"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fitting", [1, 2, 3])
def test_all_requests_end_and_nobody_runs_beside_another(policy, fitting):
    workers = [worker(name, finite(), awake_bytes=10.0) for name in "abc"]
    report = run(policy(), workers, until=120.0, memory_bytes=10.0 * fitting)
    assert [one.ended for one in workers] == [20, 20, 20]
    assert not report.lost
    ends = 0.0
    for turn in report.turns:
        assert turn.chosen_at >= ends
        ends = turn.ended_at


def test_weights_loaded_ahead_hide_the_wake():
    def busy(name):
        return worker(name, endless(), awake_bytes=10.0, sleep_s=0.1, wake_s=0.3)

    def used(prefetch):
        workers = [busy(name) for name in "abc"]
        policy = QuantumScheduler(quantum_s=1.0)
        return run(
            policy, workers, until=30.0, memory_bytes=20.0, prefetch=prefetch
        ).utilisation

    assert used(True) > 0.95
    assert used(False) < 0.85


def test_fair_shares_by_the_clock():
    workers = [worker("a", endless(), weight=2.0), worker("b", endless())]
    report = run(FairShare(quantum_s=0.2), workers, until=20.0)
    assert report.shares()["a"] == pytest.approx(2 / 3, rel=0.05)


def test_the_lock_is_held_until_its_holder_is_idle():
    workers = [worker("a", finite(30)), worker("b", endless())]
    locked = run(FifoLock(linger_s=0.5), workers, until=20.0)
    assert locked.turns[0].engine == "a"
    # All its requests, and the pauses between them, in one turn.
    assert workers[0].ended == 30
    assert sum(turn.engine == "a" for turn in locked.turns) == 1


def arbiter_with(*engines, memory_bytes=float("inf"), policy=None):
    arbiter = GpuArbiter(policy or FifoLock(), memory_bytes=memory_bytes)
    for name in engines:
        arbiter.handle(Joined(0.0, Sharer(engine=name)))
        arbiter.handle(Done(0.0, name, Action.PAUSE))
    return arbiter


def test_events_of_gone_engines_are_late_and_not_wrong():
    arbiter = arbiter_with("a")
    arbiter.handle(Left(1.0, "a"))
    assert arbiter.handle(Done(1.0, "a", Action.RESUME)) == []
    assert arbiter.handle(Wanted(1.0, "a", 3)) == []
    assert arbiter.handle(Left(1.0, "a")) == []


def test_wrong_events_are_refused():
    arbiter = arbiter_with("a", memory_bytes=10.0)
    with pytest.raises(InvalidEvent, match="there already"):
        arbiter.handle(Joined(1.0, Sharer(engine="a")))
    with pytest.raises(InvalidEvent, match="no room"):
        arbiter.handle(Joined(1.0, Sharer(engine="b", awake_bytes=11.0)))
    arbiter.handle(Asked(2.0))
    with pytest.raises(InvalidEvent, match="before"):
        arbiter.handle(Asked(1.0))
    with pytest.raises(InvalidEvent, match="never"):
        arbiter.handle(Asked(math.inf))
    with pytest.raises(InvalidEvent, match="no type"):
        arbiter.handle(attrs.make_class("Odd", ["at"])(3.0))


@pytest.mark.parametrize(
    "turn",
    [
        *(Turn("nobody"), Turn("a", 0.0), Turn("a", float("nan")), Turn("a", "1")),
        *(None, "a", Turn(["a"])),
    ],
)
def test_a_policy_that_answers_nonsense_is_blamed_and_asked_again(turn):
    class Nonsense(FifoLock):
        answers = True

        def next(self, view):
            return super().next(view) if self.answers else turn

    arbiter = arbiter_with("a", policy=Nonsense())
    Nonsense.answers = False
    [blame] = arbiter.handle(Wanted(1.0, "a", 1))
    assert isinstance(blame.error, PolicyError)
    assert str(blame.error).startswith("Nonsense.next answered")
    assert 1.0 < arbiter.alarm < 2.0
    Nonsense.answers = True
    assert arbiter.handle(Asked(arbiter.alarm)) == [Do("a", Action.RESUME)]


class Shaky(QuantumScheduler):
    """Fails in one of its methods, as soon as it is told to."""

    failing = ""
    blamed = 0

    def _maybe(self, name):
        if self.failing == name:
            raise KeyError("oops")

    def next(self, view):
        self._maybe("next")
        return super().next(view)

    def ran(self, engine, run_s, switch_s, view):
        self._maybe("ran")
        super().ran(engine, run_s, switch_s, view)

    def left(self, engine):
        self._maybe("left")
        super().left(engine)

    def upcoming(self, view):
        self._maybe("upcoming")
        return super().upcoming(view)

    def complaint(self, view):
        self._maybe("complaint")
        return super().complaint(view)


@pytest.mark.parametrize("failing", ["next", "ran", "left", "complaint"])
def test_what_a_policy_raises_loses_no_command(failing):
    arbiter = arbiter_with("a", "b", policy=Shaky())
    for name in "ab":
        arbiter.handle(Wanted(1.0, name, 1))
    arbiter.handle(Done(1.1, "a", Action.RESUME))
    arbiter.handle(Left(1.2, "a"))
    arbiter.policy.failing = failing
    commands = arbiter.handle(Failed(1.3, "b", Action.RESUME, "broken"))
    [lost] = [one for one in commands if isinstance(one, Lost)]
    assert lost.engine == "b"
    blames = [one.error for one in commands if isinstance(one, Blame)]
    assert [str(one) for one in blames] == ["Shaky raised KeyError: 'oops'"] * (
        failing != "ran"
    )


class SurvivingGpu(SimGpu):
    """Reports what a policy did wrong and goes on, as a server does."""

    def _carry_out(self, command):
        if isinstance(command, Blame):
            self.arbiter.policy.blamed += 1
        else:
            super()._carry_out(command)


@pytest.mark.parametrize("failing", ["next", "ran", "left", "upcoming", "complaint"])
def test_the_ring_goes_on_behind_a_policy_that_failed_for_a_while(failing):
    workers = [worker(name, finite(), awake_bytes=10.0) for name in "abc"]
    policy = Shaky(quantum_s=0.2)
    gpu = SurvivingGpu(GpuArbiter(policy, memory_bytes=20.0), workers, {"b": 0.5})
    gpu._agenda.put(0.3, lambda _: setattr(policy, "failing", failing))
    gpu._agenda.put(2.0, lambda _: setattr(policy, "failing", ""))
    gpu.run(until=60.0)
    assert policy.blamed
    assert [one.ended for one in workers if one.name != "b"] == [20, 20]


def test_a_simulation_stops_at_a_policy_that_fails():
    policy = Shaky()
    policy.failing = "next"
    with pytest.raises(PolicyError, match="KeyError"):
        run(policy, [worker("a", finite())], until=1.0)


def test_who_never_comes_is_not_woken():
    class Confused(FifoLock):
        def upcoming(self, view):
            return ("nobody",)

    arbiter = GpuArbiter(Confused(), memory_bytes=10.0)
    for name in "ab":
        arbiter.handle(Joined(0.0, Sharer(engine=name, awake_bytes=9.0), asleep=True))
        commands = arbiter.handle(Wanted(0.0, name, 1))
    for action in (Action.WAKE, Action.RESUME):
        commands = arbiter.handle(Done(1.0, "a", action))
    assert "Confused.upcoming answered ('nobody',)" in str(commands[-1].error)
    assert arbiter.running == "a"


@pytest.mark.parametrize(
    "wrong",
    [
        *({"memory_bytes": math.nan}, {"memory_bytes": 0.0}, {"timeout_s": -1.0}),
        *({"timeout_s": math.nan}, {"policy": None}, {"policy": FifoLock}),
    ],
)
def test_an_arbiter_needs_a_policy_and_sizes(wrong):
    with pytest.raises(InvalidSlice):
        GpuArbiter(**{"policy": FifoLock(), **wrong})
    arbiter = GpuArbiter(FifoLock())
    [(name, value)] = wrong.items()
    with pytest.raises(InvalidSlice):
        setattr(arbiter, name, value)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_may_be_replaced_in_a_turn(policy):
    workers = [worker(name, finite()) for name in "abc"]
    gpu = SimGpu(GpuArbiter(QuantumScheduler(quantum_s=0.4)), workers)
    for at in (0.3, 0.6, 1.1, 1.7):
        gpu._agenda.put(at, lambda _: setattr(gpu.arbiter, "policy", policy()))
    gpu.run(until=60.0)
    assert [one.ended for one in workers] == [20, 20, 20]


def test_a_sharer_needs_a_name_and_a_weight():
    with pytest.raises(InvalidSlice):
        Sharer(engine="")
    with pytest.raises(InvalidSlice):
        Sharer(engine="a", weight=0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "1", None, 10**400])
@pytest.mark.parametrize(
    "field", ["weight", "awake_bytes", "asleep_bytes", "pause_s", "resume_s", "wake_s"]
)
def test_a_sharer_says_amounts(field, value):
    with pytest.raises(InvalidSlice, match=f"Sharer.{field} is"):
        Sharer(engine="a", **{field: value})


def test_a_policy_of_ones_own_drives_the_gpu():
    class Whim(TimeSlice):
        def next(self, view):
            if not view.wanting:
                return Turn(view.running)
            return Turn(view.wanting[view.rng.integers(len(view.wanting))].engine, 0.05)

    workers = [worker(name, endless()) for name in "ab"]
    report = run(Whim(), workers, until=20.0)
    assert min(report.shares().values()) > 0.2
    again = [worker(name, endless()) for name in "ab"]
    assert run(Whim(), again, until=20.0).turns == report.turns


def test_the_first_command_of_a_turn_is_to_resume():
    arbiter = arbiter_with("a", "b")
    assert arbiter.handle(Wanted(1.0, "a", 1)) == [Do("a", Action.RESUME)]
    assert arbiter.running is None
    arbiter.handle(Done(1.1, "a", Action.RESUME))
    assert arbiter.running == "a"
    assert arbiter.resident("a")
