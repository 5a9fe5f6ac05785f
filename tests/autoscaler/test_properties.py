"""What holds for every autoscaler, whatever the load does."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from llmd.autoscaler import (
    Autoscaler,
    Consolidation,
    Count,
    Kpa,
    Percent,
    Rules,
    TargetConcurrency,
)
from llmd.autoscaler.behavior import Behavior, Select
from llmd.autoscaler.hpa import (
    AverageValue,
    External,
    History,
    HpaSpec,
    Pod,
    Pods,
    Sample,
    Scene,
)
from llmd.errors import NoSignal

rates = st.builds(Count, st.integers(1, 20), st.integers(1, 120)) | st.builds(
    Percent, st.integers(1, 200), st.integers(1, 120)
)
rules = st.builds(
    Rules,
    window=st.sampled_from([0.0, 15.0, 60.0, 300.0]),
    rates=st.lists(rates, min_size=1, max_size=3).map(tuple),
    select=st.sampled_from(Select),
)
behaviors = st.none() | st.builds(Behavior, up=rules, down=rules)


def make_spec(behavior, low=1, high=40, metrics=1):
    return HpaSpec(
        metrics=tuple(External(f"m{i}", AverageValue(10)) for i in range(metrics)),
        min_replicas=low,
        max_replicas=high,
        behavior=behavior,
    )


def make_scene(at, replicas, loads):
    values = {f"m{i}": [v] for i, v in enumerate(loads) if v is not None}
    return Scene(now=at, replicas=replicas, present=replicas, values=values)


def follow(spec, loads, step=15.0, start=3):
    """Yield the counts an HPA gives when all it asks for is there at once."""
    history, replicas = History(), start
    for row, load in enumerate(loads):
        scene = make_scene(row * step, replicas, load)
        advice, history = spec.step(history, scene)
        replicas = advice.workers
        yield replicas


@given(behaviors, st.lists(st.integers(0, 900), max_size=40), st.integers(1, 40))
def test_within_bounds(behavior, loads, high):
    spec = make_spec(behavior, high=high)
    for count in follow(spec, [[load] for load in loads], start=3):
        assert 1 <= count <= high


@given(behaviors, st.integers(1, 39), st.integers(0, 500), st.integers(0, 500))
def test_monotone_in_load(behavior, current, load, more):
    spec = make_spec(behavior)
    old = History(wishes=((-1e6, current),))
    fewer, _ = spec.step(old, make_scene(0.0, current, [load]))
    greater, _ = spec.step(old, make_scene(0.0, current, [load + more]))
    assert fewer.workers <= greater.workers


@given(
    behaviors,
    st.integers(1, 39),
    st.lists(st.none() | st.integers(0, 500), min_size=2, max_size=4),
)
def test_an_invalid_metric_never_lowers_the_count(behavior, current, loads):
    spec = make_spec(behavior, metrics=len(loads))
    old = History(wishes=((-1e6, current),))
    advice, _ = spec.step(old, make_scene(0.0, current, loads))
    if None in loads:
        assert advice.workers >= current


@given(behaviors, st.integers(1, 40), st.integers(0, 600))
def test_an_unchanged_load_never_oscillates(behavior, start, load):
    spec = make_spec(behavior)
    course = [start, *follow(spec, [[load]] * 80, start=start)]
    moves = np.sign(np.diff(course))
    assert not (moves.min() < 0 < moves.max()), course


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.lists(st.integers(0, 30), min_size=1, max_size=8),
)
def test_average_of_pods_is_monotone(uses, extra):
    def count(values):
        pods = [Pod(name=str(row)) for row in range(len(values))]
        samples = {str(row): Sample(value) for row, value in enumerate(values)}
        scene = Scene(now=0, replicas=len(pods), pods=pods, samples={"x": samples})
        spec = HpaSpec(metrics=(Pods("x", AverageValue(10)),), max_replicas=99)
        old = History(wishes=((-1e6, len(values)),))
        return spec.step(old, scene)[0].workers

    more = [use + add for use, add in zip(uses, extra * 8, strict=False)]
    assert count(uses) <= count(more)


class Told(Autoscaler):
    """Wants what it is told."""

    wish = 0.0

    def wanted(self, view):
        if self.wish is None:
            raise NoSignal("nobody knows")
        return self.wish


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rules, rules, st.lists(st.none() | st.floats(0, 30), max_size=40))
def test_any_wish_is_wrapped(make_bench, up, down, wishes):
    bench, scaler = make_bench(2), Told(max_workers=9, up=up, down=down)
    last = 2
    for wish in wishes:
        bench.wait(7.0)
        scaler.wish = wish
        count = scaler.target(bench.view)
        assert 1 <= count <= 9
        if wish is None:
            assert count == last
        last = count


def test_an_hour_on_the_edge_changes_at_most_once(make_bench):
    bench, rng = make_bench(1), np.random.default_rng(7)
    scaler = Consolidation(
        policy=TargetConcurrency(requests_per_worker=10),
        max_workers=4,
        tolerance=0.1,
        up=Rules(window=5.0),
    )
    course = []
    for _ in range(3600):
        bench.load(int(rng.poisson(10)))
        bench.wait(1.0)
        course.append(scaler.target(bench.view))
    assert (np.diff(course) != 0).sum() <= 1
    assert set(course) <= {1, 2}


@pytest.mark.parametrize("mean", [9.0, 10.0, 11.0])
@pytest.mark.parametrize("served", [1e-9, 10.0], ids=["at once", "10 s"])
def test_kpa_rests_for_an_hour_on_the_edge(make_bench, mean, served):
    """Arrivals are random, each in flight for *served* seconds on average."""
    bench, rng = make_bench(1), np.random.default_rng(7)
    scaler = Kpa(requests_per_worker=10, max_workers=4)
    stays = math.exp(-1.0 / served)
    running, course = int(rng.poisson(mean)), []
    for _ in range(3600):
        running = rng.binomial(running, stays) + rng.poisson(mean * (1.0 - stays))
        bench.load(int(running))
        bench.wait(1.0)
        course.append(scaler.target(bench.view))
        bench.fit(course[-1])
    # Its first means are those of a few seconds.
    assert (np.diff(course[int(scaler.stable) :]) != 0).sum() <= 1
    assert set(course) <= {1, 2}


@pytest.mark.parametrize("running", [19, 20])
def test_kpa_panics_at_the_double_and_not_before(make_bench, running):
    """Nineteen of ten make "two workers" only by rounding up."""
    bench, scaler = make_bench(1), Kpa(requests_per_worker=10, max_workers=9)
    bench.load(running)
    scaler.target(bench.view)
    mode = "panic" if running == 20 else "stable"
    assert f"in {mode} mode" in scaler.advice.explain()


@pytest.mark.parametrize("load", [0, 9, 10, 11, 19, 20, 21, 33])
def test_a_constant_load_settles_and_stays(make_bench, load):
    bench = make_bench(1)
    scaler = TargetConcurrency(requests_per_worker=10, max_workers=9, patience=20.0)
    bench.load(load)
    course = []
    for _ in range(100):
        bench.wait(1.0)
        course.append(scaler.target(bench.view))
    assert len(set(course[30:])) == 1
    assert course[-1] == max(-(-load // 10), 1)
