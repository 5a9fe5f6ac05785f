"""No worker and a request that waits: any policy wakes the fleet."""

import contextlib
import math

import pytest

import llmd
from llmd import autoscaler as a
from llmd import commands as c
from llmd import events as e
from llmd.errors import InvalidPolicy, NoSignal, PolicyError


class CannotTell(a.Autoscaler):
    def wanted(self, view):
        raise NoSignal("no worker, no signal")


class Broken(a.Autoscaler):
    def wanted(self, view):
        return 1 / len(view.workers)


def nothing(view):
    return 0.0


BOUNDS = {"min_workers": 0, "max_workers": 3}


def utilisation():
    with pytest.warns(UserWarning, match="GPU utilisation"):
        return a.TargetUtilisation(measure=nothing, **BOUNDS)


POLICIES = [
    a.Forecast(rate_per_worker=5, **BOUNDS),
    a.TargetMetric(measure=nothing, per_worker=1.0, **BOUNDS),
    a.TargetMetric(measure=lambda view: math.nan, per_worker=1.0, **BOUNDS),
    utilisation(),
    a.TargetConcurrency(
        requests_per_worker=5, up=a.Rules(select=a.Select.DISABLED), **BOUNDS
    ),
    CannotTell(**BOUNDS),
    Broken(**BOUNDS),
]


def asleep(policy, waiting=True):
    cluster = llmd.Cluster(autoscaler=policy)
    cluster.handle(e.ModelAdded(0.0, "m"))
    if waiting:
        request = llmd.Request(id="r", prompt=[1], model="m")
        cluster.handle(e.RequestArrived(0.0, request))
    return cluster


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_any_policy_wakes_a_fleet_that_a_request_waits_for(policy):
    cluster = asleep(policy)
    [scale] = cluster.handle(e.Tick(1.0))
    assert isinstance(scale, c.Scale)
    assert scale.workers >= 1
    # And it is not sent to sleep again before it is up.
    with contextlib.suppress(PolicyError):
        assert all(scale.workers for scale in cluster.handle(e.Tick(2.0)))


def test_it_says_so():
    [scale] = asleep(CannotTell(**BOUNDS)).handle(e.Tick(1.0))
    assert "requests wait for a worker" in scale.advice.explain()


def test_nobody_is_woken_for_nothing_or_beyond_the_bounds():
    idle = asleep(CannotTell(**BOUNDS), waiting=False)
    assert not any(scale.workers for scale in idle.handle(e.Tick(1.0)))
    closed = asleep(CannotTell(min_workers=0, max_workers=0))
    assert not any(scale.workers for scale in closed.handle(e.Tick(1.0)))


def test_bounds_hold_though_the_policy_fails():
    cluster = asleep(Broken(min_workers=2, max_workers=3), waiting=False)
    [scale] = cluster.handle(e.Tick(1.0))
    assert scale.workers == 2
    assert "Broken cannot tell: ZeroDivisionError" in scale.advice.explain()
    with pytest.raises(PolicyError, match="Broken"):  # inside, nothing is changed
        cluster.handle(e.Tick(2.0))


class Silent(a.Autoscaler):
    """Tells by its proposals alone that it cannot tell."""

    def proposals(self, view):
        raise NoSignal("not yet")

    wanted = proposals


def test_proposals_may_lack_a_signal_too(make_bench):
    scaler = Silent(max_workers=3)
    assert scaler.target(make_bench(2).view) == 2
    assert "Silent cannot tell: not yet" in scaler.advice.explain()


class Fussy(a.Autoscaler):
    """Fails whatever is there."""

    def wanted(self, view):
        raise KeyError("gone")


def test_a_pool_whose_policy_fails_keeps_no_other_asleep():
    load = a.TargetConcurrency(requests_per_worker=1, **BOUNDS)
    pools = {"bad": a.Pool(policy=Fussy(max_workers=3)), "good": a.Pool(policy=load)}
    cluster = asleep(a.Pools(pools=pools), waiting=False)
    assert [s.workers for s in cluster.handle(e.Tick(1.0))] == [1, 0]
    request = llmd.Request(id="r", prompt=[1], model="m")
    cluster.handle(e.RequestArrived(1.0, request))
    [scale] = cluster.handle(e.Tick(2.0))
    assert (scale.pool, scale.workers) == ("good", 1)
    assert "Fussy cannot tell: KeyError: 'gone'" in str(cluster.autoscaler.advice)


def test_a_budget_rounds_no_pool_to_sleep(make_bench):
    few = a.TargetMetric(measure=nothing, per_worker=1.0, **BOUNDS)
    many = a.TargetMetric(measure=lambda view: 40.0, per_worker=1.0, max_workers=40)
    pools = {"few": a.Pool(policy=few), "many": a.Pool(policy=many)}
    scaler = a.Pools(pools=pools, budget=4)
    view = asleep(None).view
    counts = [{p.pool: p.workers for p in scaler.recommendations(view)}]
    counts += [{p.pool: p.workers for p in scaler.recommendations(view)}]
    assert counts[-1] == {"few": 1, "many": 3}


def test_a_member_that_raises_does_not_speak_for_all():
    load = a.TargetConcurrency(requests_per_worker=1)
    cluster = asleep(a.Largest(policies=(Broken(), load), **BOUNDS))
    [scale] = cluster.handle(e.Tick(1.0))
    assert scale.workers == 1
    assert "ZeroDivisionError" in scale.advice.explain()


@pytest.mark.parametrize(
    "bounds", [(2.5, 3), (True, 3), ("1", 3), (0, None), (-1, 3), (3, 2), (0, math.nan)]
)
def test_bounds_that_are_no_counts_are_refused(bounds):
    low, high = bounds
    with pytest.raises(InvalidPolicy, match="bounds"):
        CannotTell(min_workers=low, max_workers=high)


@pytest.mark.parametrize("kind", [a.Count, a.Percent])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_rates_that_limit_nothing_are_refused(kind, value):
    with pytest.raises(InvalidPolicy, match="rate"):
        kind(value, 15.0)
