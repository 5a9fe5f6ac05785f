"""HPA v2 case by case: what is there, what is measured, how many come of it.

Ids and values are those of kubernetes/kubernetes
pkg/controller/podautoscaler/{replica_calculator,horizontal}_test.go.
Resource cases: two containers a pod, each requests 1 and uses what is given,
in thousandths; None: no sample.
"""

import math

import pytest

from llmd.autoscaler.behavior import Behavior, Count, Percent, Rules, Select
from llmd.autoscaler.hpa import (
    AverageValue,
    External,
    History,
    HpaSpec,
    Object,
    Phase,
    Pod,
    Pods,
    Resource,
    Sample,
    Scene,
    Tolerance,
    Utilization,
    Value,
)
from llmd.errors import NoSignal

NOW = 10_000.0
GHOST = 1  # a sample whose pod is not there
PENDING, FAILED, DELETED, UNREADY, HOT = (
    "pending",
    "failed",
    "deleted",
    "unready",
    "hot",
)


def make_pod(index, kind=""):
    """Return a pod that is old and ready, but for its *kind*."""
    phase = {PENDING: Phase.PENDING, FAILED: Phase.FAILED}.get(kind, Phase.RUNNING)
    young = kind in (UNREADY, HOT)
    return Pod(
        name=f"pod-{index}",
        phase=phase,
        deleted=kind == DELETED,
        ready=kind not in (UNREADY, PENDING),
        started_at=NOW - (60 if young else 3600),
        ready_since=NOW - (30 if young else 3590),
        containers={"one": {"cpu": 1, "memory": 1}, "two": {"cpu": 1, "memory": 1}},
    )


def make_scene(replicas, uses, kinds, metric, factor=1):
    pods = [
        make_pod(index, kinds.get(index, ""))
        for index, use in enumerate(uses)
        if use is not GHOST
    ]
    samples = {
        f"pod-{index}": Sample(f"{use * factor}m", at=NOW)
        for index, use in enumerate(uses)
        if use is not None
    }
    return Scene(now=NOW, replicas=replicas, pods=pods, samples={metric: samples})


BOTH = {0: UNREADY, 2: UNREADY}
GONE = "no pod counts"
FOUR_PENDING = dict.fromkeys(range(1, 5), PENDING)

# id, pods asked for, target %, use of each container, odd pods by index, result
# fmt: off
RESOURCE = [
    ("R1 up", 3, 30, [300, 500, 700], {}, 5),
    ("R2 up, one unready: less", 3, 30, [300, 500, 700], {0: UNREADY}, 4),
    ("R3 samples older than readiness", 3, 30, [300, 500, 700], {0: HOT}, 4),
    ("R4 up, unready pods stop it", 3, 30, [700, 400, 500], BOTH, 3),
    ("R5 failed ones", 2, 30, [500, 700, None, None], {2: FAILED, 3: FAILED}, 4),
    ("R6 deleted pods are nothing", 2, 30, [500, 700, 100], {2: DELETED}, 4),
    ("R7 down", 5, 50, [100, 300, 500, 250, 250], {}, 3),
    ("R8 down, two unready", 5, 50, [100, 500, 300, 250, 250], BOTH, 2),
    ("R9 four pending", 5, 50, [100] + [None] * 4, FOUR_PENDING, 1),
    ("R10 inside tolerance", 3, 100, [900, 1000, 1100], {}, 3),
    ("R11 one missing, at target", 2, 100, [1000, None], {}, 2),
    ("R12 one missing, shrinks less", 3, 50, [100, 100, None], {}, 3),
    ("R13 one missing, target over 100", 2, 300, [600, None], {}, 2),
    ("R14 all missing", 2, 50, [None, None], {}, GONE),
    ("R15 all unready", 2, 50, [100, 100], {0: UNREADY, 1: UNREADY}, GONE),
    ("R16 missing and unready, up", 4, 30, [300, 500, None, 700], {0: UNREADY}, 4),
    ("R17 samples of no pod", 4, 100, [4000, 9500, 3000, 7000, GHOST, GHOST], {}, 24),
    ("R18 two missing, down", 4, 100, [400, 95, None, None], {}, 3),
    ("R19 one missing, over", 2, 100, [1900, None], {}, 2),
    ("R20 one missing, under", 2, 100, [600, None], {}, 2),
    ("R21 unready and missing", 3, 50, [100, 450, None], {0: UNREADY}, 3),
    ("R22 unready, missing, up", 3, 50, [100, 2000, None], {0: UNREADY}, 4),
    ("R23 unready, missing, down", 4, 50, [100, 100, 100, None], {0: UNREADY}, 3),
    ("R24 a surge pod, missing", 2, 50, [100, 100, None], {}, 2),
]
# fmt: on


@pytest.mark.parametrize(
    ("replicas", "percent", "uses", "kinds", "result"),
    [case[1:] for case in RESOURCE],
    ids=[case[0] for case in RESOURCE],
)
def test_resource_utilization(replicas, percent, uses, kinds, result):
    scene = make_scene(replicas, uses, kinds, "cpu", factor=2)
    metric = Resource("cpu", Utilization(percent))
    if result is GONE:
        with pytest.raises(NoSignal):
            metric.count(scene, Tolerance())
    else:
        assert metric.count(scene, Tolerance()) == result


# id, pods asked for, target, use of each pod, odd pods by index, result
# fmt: off
PODS = [
    ("P1 up", 3, "15k", ["20k", "10k", "30k"], {}, 4),
    ("P2 readiness is not asked", 3, "15k", ["50k", "10k", "30k"], {2: UNREADY}, 6),
    ("P3 pending: up is dampened", 3, "15k", ["50k", "15k", "30k"], {1: PENDING}, 6),
    ("P4 down", 5, "20", ["12", "12", "12", "12", "12"], {}, 3),
    ("P5 inside tolerance", 3, "20", ["19", "20", "21"], {}, 3),
    ("P6 mean is cut, then inside", 2, "10", ["9500m", "8501m"], {}, 2),
    ("P7 missing, up", 2, "10", ["20", None], {}, 2),
    ("P9 two unready, all the same", 3, "15k", ["50k", "15k", "30k"], BOTH, 7),
    ("P10 a surge pod, missing", 2, "17k", ["10k", "10k", None], {}, 2),
    ("P8 missing, down", 4, "10", ["2", "2", "2", None], {}, 2),
]
# fmt: on


@pytest.mark.parametrize(
    ("replicas", "target", "uses", "kinds", "result"),
    [case[1:] for case in PODS],
    ids=[case[0] for case in PODS],
)
def test_pods_average(replicas, target, uses, kinds, result):
    pods = [make_pod(index, kinds.get(index, "")) for index in range(len(uses))]
    samples = {f"pod-{i}": Sample(use) for i, use in enumerate(uses) if use is not None}
    scene = Scene(now=NOW, replicas=replicas, pods=pods, samples={"qps": samples})
    assert Pods("qps", AverageValue(target)).count(scene, Tolerance()) == result


# id, pods asked for, ready pods, kind, target, values in thousandths, result
# fmt: off
SERIES = [
    ("E1 counts ready pods", 3, 1, External, Value("4400m"), [8600], 2),
    ("E2 inside tolerance", 3, 3, External, Value("4400m"), [4600], 3),
    ("E3 average", 3, 3, External, AverageValue("2150m"), [8600], 4),
    ("E4 average, inside", 3, 3, External, AverageValue("2867m"), [8600], 3),
    ("E5 from zero", 0, 0, External, Value("4400m"), [8600], 2),
    ("E6 to zero", 3, 3, External, Value("4400m"), [0], 0),
    ("E7 average, from zero", 0, 0, External, AverageValue("1000m"), [2500], 3),
    ("E8 series are added", 3, 3, External, Value("4400m"), [4300, 4300], 6),
    ("E9 unready pods do not count", 5, 3, Object, Value("15"), [20_000], 4),
    ("E10 huge", 3, 3, Object, Value("1m"), [10**17], 2**31 - 1),
]
# fmt: on


@pytest.mark.parametrize(
    ("replicas", "ready", "kind", "target", "values", "result"),
    [case[1:] for case in SERIES],
    ids=[case[0] for case in SERIES],
)
def test_object_and_external(replicas, ready, kind, target, values, result):
    pods = [make_pod(i, "" if i < ready else UNREADY) for i in range(replicas)]
    series = [f"{value}m" for value in values]
    scene = Scene(now=NOW, replicas=replicas, pods=pods, values={"queue": series})
    assert kind("queue", target).count(scene, Tolerance()) == result


# id, use of each of 10 pods at target 10, tolerance up, down, result
# fmt: off
TOLERANCE = [
    ("T1 at the upper edge", 11.0, 0.1, 0.1, 10),
    ("T2 just over", 11.001, 0.1, 0.1, 12),
    ("T3 at the lower edge", 9.0, 0.1, 0.1, 10),
    ("T4 just under", 8.999, 0.1, 0.1, 9),
    ("T5 wide up alone", 14.0, 0.5, 0.1, 10),
    ("T6 wide up, down as ever", 8.0, 0.5, 0.1, 8),
    ("T7 none", 10.001, 0.0, 0.0, 11),
]
# fmt: on


@pytest.mark.parametrize(
    ("use", "up", "down", "result"),
    [case[1:] for case in TOLERANCE],
    ids=[case[0] for case in TOLERANCE],
)
def test_tolerance(use, up, down, result):
    pods = [make_pod(index) for index in range(10)]
    samples = {pod.name: Sample(use) for pod in pods}
    scene = Scene(now=NOW, replicas=10, pods=pods, samples={"x": samples})
    metric = Pods("x", AverageValue(10))
    assert metric.count(scene, Tolerance(up=up, down=down)) == result


def want(count, current, behavior, bounds, history):
    """Return what one pass makes of a metric that asks for *count*."""
    metric = External("wish", AverageValue(1))
    spec = HpaSpec(
        metrics=(metric,),
        min_replicas=bounds[0],
        max_replicas=bounds[1],
        behavior=behavior,
        tolerance=0.0,
    )
    scene = Scene(now=NOW, replicas=current, present=current, values={"wish": [count]})
    advice, _ = spec.step(history, scene)
    return advice.workers


def ago(*changes):
    """Return changes of 1, 2, ... seconds ago."""
    return tuple((NOW - age, change) for age, change in enumerate(changes, 1))


def up(*rates, select=Select.MAX):
    return Behavior(up=Rules(window=0.0, rates=rates, select=select))


def down(*rates, select=Select.MAX):
    return Behavior(down=Rules(window=0.0, rates=rates, select=select))


ANY = (1, 1000)
TWO = Count(2, 60), Percent(100, 60)
DROP = Count(20, 60), Percent(1, 60)
MIN, OFF = Select.MIN, Select.DISABLED

# id, current, wish, bounds, behavior, added, removed, result
# fmt: off
RATES = [
    ("B1 default up", 10, 50, ANY, Behavior(), (), (), 20),
    ("B1b default up, from 1", 1, 50, ANY, Behavior(), (), (), 5),
    ("B2", 10, 500, ANY, up(Count(100, 60), Percent(100, 60)), (), (), 110),
    ("B3", 10, 500, ANY, up(*TWO), (), (), 20),
    ("B4 least", 10, 500, ANY, up(*TWO, select=MIN), (), (), 12),
    ("B5 max", 100, 1000, (1, 150), Behavior(), (), (), 150),
    ("B6 up off", 10, 500, ANY, up(Count(9, 60), select=OFF), (), (), 10),
    ("B7", 100, 0, ANY, down(*DROP), (), (), 80),
    ("B7b least", 100, 0, ANY, down(*DROP, select=MIN), (), (), 99),
    ("B8 added before", 100, 1000, ANY, up(Count(150, 120)), (1, 5, 9), (), 235),
    ("B9 and removed", 100, 1000, ANY, up(Count(150, 120)), (1, 5, 9), (4,), 239),
    ("B10 all is used up", 100, 1000, ANY, up(Count(10, 120)), (20,), (), 100),
    ("B11 percent rounds up", 1, 9, ANY, up(Percent(10, 60)), (), (), 2),
    ("B12", 100, 0, ANY, down(Percent(50, 120)), (), (2, 4, 6), 56),
    ("B13 all is used up", 100, 0, ANY, down(Percent(5, 120)), (), (20,), 100),
    ("B14 too old to count", 100, 1000, ANY, up(Count(15, 2)), (0, 9, 9), (), 115),
    ("B15 min", 100, 0, (5, 1000), down(Percent(100, 60)), (), (), 5),
    ("B16 percent cuts", 3, 0, ANY, down(Percent(10, 60)), (), (), 2),
    ("B17 down off", 10, 1, ANY, down(Count(9, 60), select=OFF), (), (), 10),
    ("B18 no behavior up", 10, 50, ANY, None, (), (), 20),
    ("B19 no behavior, from 1", 1, 50, ANY, None, (), (), 4),
    ("B20 over max, no rate binds", 50, 50, (1, 10), up(Count(1, 60)), (), (), 10),
    ("B21 under min, no rate binds", 2, 2, (30, 90), up(Count(1, 60)), (), (), 30),
    ("B22 zero is left alone", 0, 9, (1, 10), None, (), (), 0),
    ("B23 zero wakes", 0, 3, (0, 10), None, (), (), 3),
]
# fmt: on


@pytest.mark.parametrize(
    ("current", "wish", "bounds", "behavior", "added", "removed", "result"),
    [case[1:] for case in RATES],
    ids=[case[0] for case in RATES],
)
def test_rates_and_bounds(current, wish, bounds, behavior, added, removed, result):
    seed = ((NOW - 9999, current),)
    history = History(wishes=seed, added=ago(*added), removed=ago(*removed))
    assert want(wish, current, behavior, bounds, history) == result


FREE_UP, FREE_DOWN = (Count(999, 15),), (Percent(100, 15),)


def windows(up_window, down_window):
    return Behavior(
        up=Rules(window=up_window, rates=FREE_UP),
        down=Rules(window=down_window, rates=FREE_DOWN),
    )


# id, current, wish, up window, down window, earlier wishes by age, result
# fmt: off
WINDOWS = [
    ("S1 down held by the highest", 100, 3, 0, 180, {120: 4, 60: 5}, 5),
    ("S2 up held by the lowest", 1, 7, 300, 0, {120: 4, 60: 5}, 4),
    ("S3 older than the window", 100, 3, 0, 100, {120: 9, 60: 5}, 5),
    ("S4 exactly as old is too old", 100, 3, 0, 60, {60: 5}, 3),
    ("S5 both, between", 4, 4, 300, 300, {120: 2, 60: 9}, 4),
    ("S6 both, over", 1, 7, 300, 300, {120: 4, 60: 5}, 4),
    ("S7 no behavior holds 300 s", 9, 3, None, None, {301: 8, 299: 7}, 7),
    ("S8 no behavior, exactly as old", 9, 3, None, None, {300: 8}, 8),
    ("S9 default down window", 9, 3, 0, math.nan, {299: 7}, 7),
]
# fmt: on


@pytest.mark.parametrize(
    ("current", "wish", "up_window", "down_window", "earlier", "result"),
    [case[1:] for case in WINDOWS],
    ids=[case[0] for case in WINDOWS],
)
def test_windows(current, wish, up_window, down_window, earlier, result):
    wishes = tuple((NOW - age, count) for age, count in earlier.items())
    behavior = None
    if up_window is not None:
        unset = down_window != down_window
        behavior = windows(up_window, None if unset else down_window)
    history = History(wishes=wishes)
    assert want(wish, current, behavior, ANY, history) == result


# id, current, proposals (None: cannot be told), result
# fmt: off
METRICS = [
    ("C1 the largest", 3, [2, 5, 4], 5),
    ("C2 one fails, another wants more", 3, [None, 5], 5),
    ("C3 one fails, another wants fewer: hold", 3, [None, 2], 3),
    ("C4 all fail: hold", 3, [None, None], 3),
    ("C5 one fails, another is content", 3, [3, None], 3),
    ("C6 fewer, all told", 3, [1, 2], 2),
]
# fmt: on


@pytest.mark.parametrize(
    ("current", "proposals", "result"),
    [case[1:] for case in METRICS],
    ids=[case[0] for case in METRICS],
)
def test_several_metrics(current, proposals, result):
    names = [f"metric-{row}" for row in range(len(proposals))]
    spec = HpaSpec(
        metrics=tuple(External(name, AverageValue(1)) for name in names),
        max_replicas=100,
    )
    values = {
        name: [count]
        for name, count in zip(names, proposals, strict=True)
        if count is not None
    }
    scene = Scene(now=NOW, replicas=current, present=current, values=values)
    history = History(wishes=((NOW - 9999, current),))
    assert spec.step(history, scene)[0].workers == result
