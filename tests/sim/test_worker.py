"""The model worker against an engine that takes one step at a time."""

import attrs
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from llmd import Machine, Request, Worker
from llmd import events as e
from llmd.sim import EngineSettings, ModelWorker
from llmd.sim.prompts import SegmentPrompt
from llmd.sim.scheduler import Scheduler
from llmd.sim.sequence import Sequence

MACHINE = Machine(prefill_floor_s=0.02, decode_floor_s=0.01)
MACHINES = {
    "GPU alone": MACHINE,
    # The host takes as long for a prompt as the GPU for several steps.
    "host": attrs.evolve(MACHINE, host_s=6e-3, host_s_per_request=2e-4),
    "slow host": attrs.evolve(MACHINE, host_s=0.012),
    # At first the host takes longer for a step, and then the GPU.
    "crossing": attrs.evolve(MACHINE, host_s=0.0105, decode_s_per_context_token=1e-5),
    "shared": attrs.evolve(
        MACHINE, decode_s_per_context_token=1e-5, shared_read=0.25, decode_floor_s=1e-3
    ),
    "hot": attrs.evolve(MACHINE, host_s=6e-3, hot_slowdown=0.5),
}


class Plodding(Scheduler):
    """Plans one step at a time."""

    def _most_steps(self, chunks):
        return min(super()._most_steps(chunks), 1)


def make(worker=None, machine=MACHINE, **settings):
    worker = worker or Worker(id="w", kv_blocks=1000, block_tokens=16)
    return ModelWorker(worker, machine, EngineSettings(**settings))


def sequence(id, tokens, output=1, text=None, prefill_only=False, **kwargs):
    prompt = SegmentPrompt([(text or sum(id.encode()), tokens)])
    request = Request(id=id, prompt=prompt, **kwargs)
    names = request.hashes(16).tolist()
    return Sequence(request, None, output, names, prefill_only=prefill_only)


def drain(model, arrivals, aborts=()):
    """Play *arrivals*, (time, sequence), out; return all events."""
    todo = [(at, 0, s) for at, s in arrivals] + [(at, 1, id) for at, id in aborts]
    todo.sort(key=lambda entry: entry[:2])
    events, wake = [], None
    while todo or wake is not None:
        if todo and (wake is None or todo[0][0] < wake):
            at, kind, what = todo.pop(0)
            new = (model.abort if kind else model.submit)(what, at)
            if model.busy:
                wake = new or wake
        else:
            at, wake = wake, None
            model.finish(at)
            wake = model.plan(at)
        model.kv.cache.check()
        events += model.take()
    return events


def times(events, kind):
    return {ev.request_id: ev.at for ev in events if isinstance(ev, kind)}


def test_one_request_takes_its_prefill_and_its_steps():
    events = drain(make(), [(0.0, sequence("a", 100, output=11))])
    first = MACHINE.prefill_s(100.0)
    steps = [MACHINE.decode_s(1, 101 + i) for i in range(10)]
    assert times(events, e.FirstToken)["a"] == pytest.approx(first)
    assert times(events, e.RequestEnded)["a"] == pytest.approx(first + sum(steps))


@pytest.mark.parametrize("shared_read", [1.0, 0.25, 0.0])
def test_what_another_reads_as_well_costs_less(shared_read):
    machine = attrs.evolve(MACHINE, shared_read=shared_read)
    model = make(machine=machine)
    shared, own = {"text": 5, "output": 101}, {"text": 6, "output": 101}
    arrivals = [("a", shared), ("b", shared), ("c", shared), ("d", own)]
    drain(model, [(0.0, sequence(id, 100, **fields)) for id, fields in arrivals])
    alone = sum([run[2] for run in model.log if run[3] == 1])
    [(start, end, steps, *_)] = [run for run in model.log if run[3] == 4]
    assert steps == 100 - alone, "till the first has its answer"
    contexts = sum(4 * (101 + step) + alone for step in range(steps))
    # Six full blocks of the first are read by two others too.
    contexts -= steps * 2 * 96 * (1 - shared_read)
    want = steps * machine.decode_s(4, contexts / steps)
    assert end - start == pytest.approx(want)


def test_a_long_prompt_is_computed_in_chunks_beside_decoding():
    model = make(step_tokens=64)
    events = drain(
        model, [(0.0, sequence("a", 16, output=50)), (0.02, sequence("b", 500))]
    )
    tokens = [(int(run[2]), int(run[4])) for run in model.log]
    # 63 tokens a step go to b while a decodes: 7 full chunks and the rest.
    assert (7, 7 * 63) in tokens
    assert (1, 500 - 7 * 63) in tokens
    assert times(events, e.RequestEnded).keys() == {"a", "b"}


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_who_comes_in_a_step_joins_after_what_was_scheduled_ahead(steps_ahead):
    model = make(steps_ahead=steps_ahead)
    first, second = sequence("a", 10, output=50), sequence("b", 10)
    began = MACHINE.prefill_s(10.0)
    steps = MACHINE.decode_s(1, 11.0), MACHINE.decode_s(1, 12.0)
    # Half-way through the first step that decodes.
    events = drain(model, [(0.0, first), (began + 0.005, second)])
    [at] = [
        event.at
        for event in events
        if isinstance(event, e.FirstToken) and event.request_id == "b"
    ]
    joined = began + sum(steps[: 1 + steps_ahead])
    with_it = MACHINE.step_s(10, 0, 1, 12.0 + steps_ahead)
    assert at == pytest.approx(joined + with_it, rel=1e-3)


def test_nothing_is_scheduled_ahead_of_an_idle_engine():
    model = make()
    arrivals = [(0.0, sequence("a", 10)), (0.005, sequence("b", 10))]
    events = drain(model, arrivals)
    times = [event.at for event in events if isinstance(event, e.FirstToken)]
    assert times == pytest.approx([MACHINE.prefill_s(10.0) * k for k in (1, 2)])


def test_a_second_prompt_finds_full_blocks_but_its_last_token_is_computed():
    model = make()
    events = drain(
        model,
        [(0.0, sequence("a", 64, text=5)), (1.0, sequence("b", 64, text=5))],
    )
    cached = {
        ev.request_id: ev.cached_tokens for ev in events if hasattr(ev, "cached_tokens")
    }
    assert cached == {"a": 0, "b": 48}


def test_without_prefix_caching_nothing_is_found():
    model = make(prefix_caching=False)
    events = drain(
        model,
        [(0.0, sequence("a", 64, text=5)), (1.0, sequence("b", 64, text=5))],
    )
    assert {getattr(ev, "cached_tokens", 0) for ev in events} == {0}
    assert not [ev for ev in events if isinstance(ev, e.BlocksStored)]


def test_the_last_to_come_is_thrown_out_when_blocks_run_short_and_still_ends():
    model = make(Worker(id="w", kv_blocks=12, block_tokens=16))
    events = drain(
        model,
        [(0.0, sequence("a", 64, output=100)), (0.0, sequence("b", 64, output=100))],
    )
    assert model.preemptions > 0
    ended = times(events, e.RequestEnded)
    assert ended["a"] < ended["b"]
    generated = sum(ev.tokens for ev in events if isinstance(ev, e.TokensGenerated))
    assert generated == 2 * 99
    assert len(times(events, e.FirstToken)) == 2


def test_priorities_reorder_those_that_wait():
    model = make(Worker(id="w", max_running=1), by_priority=True)
    events = drain(
        model,
        [
            (0.0, sequence("a", 100, output=20)),
            (0.01, sequence("low", 100, priority=5)),
            (0.02, sequence("high", 100, priority=-5)),
        ],
    )
    first = times(events, e.FirstToken)
    assert first["high"] < first["low"]


@pytest.mark.parametrize("end", ["release", "abort"])
def test_blocks_of_a_prompt_that_is_handed_over_let_in_who_waits(end):
    model = make(Worker(id="w", kv_blocks=30, block_tokens=16))
    handed = sequence("handed", 160, prefill_only=True)
    arrivals = [handed, sequence("long", 32, output=200), sequence("waits", 320)]
    wake = None
    for one in arrivals:
        wake = model.submit(one, 0.0) or wake
    while wake < 0.2:
        model.finish(wake)
        wake = model.plan(wake)
    cut = getattr(model, end)("handed", 0.2)
    assert cut is not None, "the run under way ends with its step"
    assert cut < 0.2 + 2 * MACHINE.decode_s(1, 300.0)
    model.finish(cut)
    model.plan(cut)
    assert model._scheduler.queued == 0


def test_a_prompt_larger_than_the_cache_fails_at_once():
    model = make(Worker(id="w", kv_blocks=3, block_tokens=16))
    [event] = drain(model, [(0.0, sequence("a", 100))])
    assert "larger than the KV cache" in event.error


def test_an_abort_frees_everything():
    model = make()
    drain(
        model,
        [(0.0, sequence("a", 5000, output=500)), (0.0, sequence("b", 50, output=900))],
        aborts=[(0.03, "a"), (0.5, "b")],
    )
    assert model.kv.cache.used_blocks == 0
    assert not model.held


def test_what_an_aborted_prompt_has_computed_is_found_again():
    model = make(step_tokens=512)
    long = {"tokens": 5000, "text": 9}
    gone = drain(model, [(0.0, sequence("a", **long))], aborts=[(0.03, "a")])
    stored = sum(len(ev.hashes) for ev in gone if isinstance(ev, e.BlocksStored))
    assert stored % 32 == 0
    assert 0 < stored < 5000 // 16
    assert model.kv.cache.used_blocks == 0
    again = drain(model, [(9.0, sequence("b", **long))])
    [first] = [ev for ev in again if isinstance(ev, e.FirstToken)]
    assert first.cached_tokens == stored * 16


requests = st.lists(
    st.tuples(
        st.floats(0, 2),
        st.integers(1, 300),
        st.integers(1, 60),
        st.integers(1, 3),
        st.none() | st.floats(0, 1.5),
    ),
    max_size=12,
)


def settle(plan, step_tokens, kv_blocks, places, single, machine=MACHINE):
    """Run *plan*; *single* forbids to advance several steps at once."""
    worker = Worker(id="w", kv_blocks=kv_blocks, block_tokens=16, max_running=places)
    model = make(worker, machine, step_tokens=step_tokens)
    if single:
        shares = machine.shared_read < 1
        model._scheduler = Plodding(worker, model.settings, model.kv, shares)
    arrivals, aborts = [], []
    for row, (at, tokens, output, text, patience) in enumerate(plan):
        arrivals.append((at, sequence(f"r{row}", tokens, output, text=text)))
        if patience is not None:
            aborts.append((at + patience, f"r{row}"))
    return model, drain(model, arrivals, aborts)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@given(requests, st.integers(8, 100), st.integers(23, 60), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_advancing_many_steps_at_once_changes_nothing(
    machine, plan, step_tokens, blocks, places
):
    size = step_tokens, blocks, places
    fast, quick = settle(plan, *size, single=False, machine=machine)
    slow, steady = settle(plan, *size, single=True, machine=machine)
    for kind in (e.FirstToken, e.RequestEnded):
        one, other = times(quick, kind), times(steady, kind)
        assert one.keys() == other.keys()
        assert [one[id] for id in one] == pytest.approx([other[id] for id in one])
    assert fast.preemptions == slow.preemptions
    assert fast.kv.cache.used_blocks == slow.kv.cache.used_blocks == 0


@given(requests, st.integers(8, 100), st.integers(23, 60), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_tokens_and_blocks_are_conserved(plan, step_tokens, blocks, places):
    model, events = settle(plan, step_tokens, blocks, places, single=False)
    held: set[int] = set()
    generated = {f"r{row}": 0 for row in range(len(plan))}
    for event in events:
        match event:
            case e.BlocksStored(hashes=hashes):
                assert not held & set(hashes.tolist())
                held |= set(hashes.tolist())
            case e.BlocksRemoved(hashes=hashes):
                held -= set(hashes.tolist())
            case e.FirstToken(request_id=id):
                assert generated[id] == 0
                generated[id] = 1
            case e.TokensGenerated(request_id=id, tokens=tokens):
                assert generated[id] >= 1
                generated[id] += tokens
            case e.RequestEnded(request_id=id, error=None):
                row = int(id[1:])
                assert generated[id] == plan[row][2]
    assert held == model.kv.cache.names()
    assert np.all(np.diff([run[1] for run in model.log]) > 0)


def test_metrics_are_those_of_the_last_step():
    worker = Worker(id="w", kv_blocks=1000, block_tokens=16)
    settings = EngineSettings(step_tokens=1000, steps_ahead=0)
    model = ModelWorker(worker, Machine(), settings)

    def asked(id, at):
        prompt = Request(id=id, prompt=range(1000), salt=id)
        return model.submit(Sequence(prompt, None, 5, []), at)

    def told(at):
        signals = model.signals(at)
        return signals.running_requests, signals.waiting_requests

    first = asked("a", 0.0)
    asked("b", first / 2)
    # An engine sets them when a step ends: until then it seems idle.
    assert told(0.9 * first) == (0.0, 0.0)
    model.finish(first)
    second = model.plan(first)
    assert told(first) == (1.0, 0.0)  # b came during the step
    asked("c", first + 0.1 * (second - first))
    model.finish(second)
    assert model.signals(second).running_requests == 2.0
    assert model.signals(second).kv_usage > 0.1


def test_who_is_taken_in_two_steps_later_is_never_seen_to_wait():
    # As the next step is scheduled ahead, and metrics are set after the one after.
    model = ModelWorker(Worker(id="w"), MACHINE, EngineSettings())
    end = model.submit(sequence("a", 100, output=50), 0.0)
    model.finish(end)
    seen, joined, came = [], False, end + 0.001
    end = model.plan(end)
    end = model.submit(sequence("b", 100, output=50), came) or end
    while not joined:
        model.finish(end)
        signals = model.signals(end)
        seen.append(signals.waiting_requests)
        joined = signals.running_requests == 2.0
        end = model.plan(end)
    assert seen == [0.0] * len(seen)
    assert len(seen) >= 2


def test_who_finds_no_room_is_seen_to_wait():
    model = ModelWorker(Worker(id="w", max_running=1), MACHINE, EngineSettings())
    end = model.submit(sequence("a", 100, output=50), 0.0)
    model.submit(sequence("b", 100), 0.5 * end)
    for _ in range(2):
        model.finish(end)
        end = model.plan(end)
    # Its third step has begun, and b could not join the second.
    assert model.signals(end).waiting_requests == 1.0


def test_full_blocks_of_who_is_thrown_out_wait_for_their_turn():
    model = make(Worker(id="w", kv_blocks=20, block_tokens=16))
    released = []
    release = model.kv.cache.release

    def watched(names, blank=0, spent=0):
        released.append((blank, spent))
        release(names, blank, spent)

    model.kv.cache = Watched(model.kv.cache, watched)
    drain(model, [(0.0, sequence("one", 64, 150)), (0.0, sequence("two", 64, 150))])
    assert model.preemptions
    # Only the last block of each is not full.
    assert all(blank <= 1 for blank, _ in released)
    assert max(spent for _, spent in released) > 4


class Watched:
    """A cache of which one method is another."""

    def __init__(self, cache, release):
        self._cache, self.release = cache, release

    def __getattr__(self, name):
        return getattr(self._cache, name)
