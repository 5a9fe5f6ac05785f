"""What nobody should ask for: each a clear error, and nothing booked."""

import logging
import math

import numpy as np
import pytest

import llmd
from llmd import commands as c
from llmd import events as e
from llmd.errors import InvalidEvent, InvalidRequest, PolicyError
from llmd.sim import compare, simulate, workloads


@pytest.fixture
def cluster():
    cluster = llmd.Cluster(router=llmd.LeastLoaded())
    for id in "ab":
        cluster.handle(e.WorkerJoined(0.0, llmd.Worker(id=id, max_model_tokens=99)))
    return cluster


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": "5"},
        {"max_new_tokens": math.nan},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": True},
        {"max_new_tokens": 0},
        {"deadline": math.nan},
        {"priority": "x"},
        {"priority": 0.5},
        {"salt": None},
        {"model": ["m"]},
        {"tenant": 7},
        {"id": 5},
        {"id": ""},
        {"prompt": []},
        {"prompt": [-1]},
        {"prompt": [0.5]},
        {"media": ((1, "behind the prompt"),)},
        {"media": ((0, ""),)},
        {"media": ("key",)},
        {"media": ((0, b"key"),)},
    ],
    ids=repr,
)
def test_a_request_of_wrong_values(fields):
    with pytest.raises(InvalidRequest):
        llmd.Request(**({"id": "r", "prompt": [1]} | fields))


def test_whole_numbers_of_numpy_will_do():
    request = llmd.Request(id="r", prompt=[1], max_new_tokens=np.int64(5))
    assert request.max_new_tokens == 5


def test_one_name_for_a_collection_of_names():
    with pytest.raises(InvalidRequest, match="collection"):
        llmd.Worker(id="w", models="llama")


@pytest.mark.parametrize("at", [math.inf, math.nan, -1.0])
def test_times_that_cannot_be(cluster, at):
    with pytest.raises(InvalidEvent):
        cluster.handle(e.Tick(at))
    assert cluster.handle(e.Tick(1.0)) == []


def test_a_retry_goes_elsewhere(cluster):
    """A worker that fails fast looks idle, and would get every retry."""
    for number in range(8):
        at = 1.0 + number
        request = llmd.Request(id=f"r{number}", prompt=[1, 2])
        [sent] = cluster.handle(e.RequestArrived(at, request))
        first = sent.decision.decode
        again = cluster.handle(e.RequestEnded(at, first, request.id, error="broken"))
        assert [type(command) for command in again] == [c.Requeue, c.Dispatch]
        second = again[1].decision.decode
        assert second != first
        # Nowhere is left where it did not fail: better there than not at all.
        [_, third] = cluster.handle(
            e.RequestEnded(at, second, request.id, error="broken")
        )
        cluster.handle(e.RequestEnded(at, third.decision.decode, request.id))
    assert not cluster.view.workers.running_requests.any()


@pytest.fixture
def full():
    """Two workers with a request each, x and y, and room for no other."""
    cluster = llmd.Cluster(router=llmd.LeastLoaded())
    for id in "ab":
        cluster.handle(e.WorkerJoined(0.0, llmd.Worker(id=id, max_running=1)))
    for name in "xy":
        cluster.handle(e.RequestArrived(1.0, llmd.Request(id=name, prompt=[1])))
    return cluster


def test_a_retry_waits_for_room_elsewhere(full):
    cluster, worker = full, full.runs("x").decode
    [again] = cluster.handle(e.RequestEnded(2.0, worker, "x", error="broken"))
    assert isinstance(again, c.Requeue)
    other = cluster.runs("y").decode
    [sent] = cluster.handle(e.RequestEnded(3.0, other, "y"))
    assert sent.decision.decode == other


def test_who_waited_alone_answers_for_its_turn(full):
    class Moody(llmd.Fcfs):
        angry = False

        def flow(self, request):
            return request.tenant

        def turn(self, flow, view):
            if self.angry and flow == "a":
                raise ZeroDivisionError("no turn")
            return 0

    full.balancer = order = Moody()

    def arrive(tenant):
        request = llmd.Request(id=tenant, prompt=[1], tenant=tenant)
        return full.handle(e.RequestArrived(2.0, request))

    assert arrive("a") == []
    order.angry = True
    commands = arrive("b") + full.handle(e.Tick(3.0))
    assert [command.request.id for command in commands] == ["a"]
    assert isinstance(commands[0].error, PolicyError)
    assert full.waits("b")


def test_a_retry_that_waits_holds_nobody_up(full):
    cluster, worker = full, full.runs("x").decode
    cluster.handle(e.RequestEnded(2.0, worker, "x", error="broken"))
    [sent] = cluster.handle(e.RequestArrived(3.0, llmd.Request(id="z", prompt=[1])))
    assert sent.decision.decode == worker
    assert cluster.waits("x")


def test_an_observer_that_raises_changes_nothing(cluster, caplog):
    def boom(entry):
        raise ZeroDivisionError("in the observer")

    cluster.observer = boom
    request = llmd.Request(id="r", prompt=[1])
    with caplog.at_level(logging.ERROR):
        [command] = cluster.handle(e.RequestArrived(1.0, request))
    assert isinstance(command, c.Dispatch)
    assert "in the observer" in caplog.text


def test_what_is_no_balancer_is_refused(cluster):
    with pytest.raises(PolicyError, match="QueueBalancer"):
        cluster.balancer = None
    request = llmd.Request(id="r", prompt=[1])
    assert cluster.handle(e.RequestArrived(1.0, request))


def test_who_raised_is_blamed(cluster):
    class Broken(llmd.balancer.Fcfs):
        def room(self, request, view):
            raise ZeroDivisionError("no room")

    cluster.balancer = Broken()
    request = llmd.Request(id="r", prompt=[1])
    [failed] = cluster.handle(e.RequestArrived(1.0, request))
    assert "Broken" in str(failed.error)
    assert "LeastLoaded" not in str(failed.error)


def test_costs_that_are_no_order(cluster):
    class Complex(llmd.Router):
        def cost(self, request, view):
            return 1j * np.ones(len(view.workers))

    cluster.router = Complex()
    request = llmd.Request(id="r", prompt=[1])
    [failed] = cluster.handle(e.RequestArrived(1.0, request))
    assert isinstance(failed.error, PolicyError)
    assert not cluster.view.workers.running_requests.any()


def test_simulations_of_nothing():
    load = workloads.batch(requests=3)
    with pytest.raises(InvalidRequest):
        simulate(llmd.RoundRobin(), load, workers=0)
    with pytest.raises(InvalidRequest):
        simulate(llmd.RoundRobin, load)
    with pytest.raises(InvalidRequest):
        compare([], load)


class Verbose(llmd.Router):
    """Says a lot of itself, and of what went wrong."""

    def __repr__(self):
        return "Verbose(" + "settings, " * 10_000 + ")"

    def cost(self, request, view):
        raise ValueError("again and " * 10_000)


def test_errors_name_a_policy_and_do_not_print_all_of_it():
    cluster = llmd.Cluster(router=Verbose())
    cluster.handle(e.WorkerJoined(0.0, llmd.Worker(id="a")))
    request = llmd.Request(id="r", prompt=[1])
    [failed] = cluster.handle(e.RequestArrived(0.0, request))
    assert str(failed.error).startswith("Verbose raised ValueError: again and")
    with pytest.raises(PolicyError, match=r"Verbose\(settings") as caught:
        cluster.balancer = Verbose()
    assert max(len(str(failed.error)), len(str(caught.value))) < 700


@pytest.mark.parametrize("name", ["router", "balancer", "index", "autoscaler"])
@pytest.mark.parametrize("value", ["LeastLoaded", object(), int])
def test_a_policy_is_an_object_of_its_kind(name, value):
    with pytest.raises(PolicyError, match="is no "):
        llmd.Cluster(**{name: value})
    cluster = llmd.Cluster()
    before = getattr(cluster, name)
    with pytest.raises(PolicyError, match="is no "):
        setattr(cluster, name, value)
    assert getattr(cluster, name) is before


def test_a_class_is_no_policy():
    with pytest.raises(PolicyError, match="is no Router"):
        llmd.Cluster(router=llmd.LeastLoaded)
