"""A fork goes on as the cluster would have, and does not touch it."""

import numpy as np
import pytest

import llmd
from llmd import commands as c
from llmd import events as e


def filled(router):
    cluster = llmd.Cluster(router=router, seed=4)
    for id in "abc":
        cluster.handle(e.WorkerJoined(0.0, llmd.Worker(id=id)))
    for row in range(40):
        arrive(cluster, row, 0.1 * row)
    return cluster


def arrive(cluster, row, at):
    prompt = np.arange(200) + row % 3
    request = llmd.Request(id=f"r{row}", prompt=prompt, arrived_at=at)
    [dispatch] = cluster.handle(e.RequestArrived(at, request))
    assert isinstance(dispatch, c.Dispatch)
    worker = dispatch.decision.decode
    if row % 2:
        cluster.handle(e.BlocksStored(at, worker, request.hashes(16), 16))
        cluster.handle(e.FirstToken(at, worker, request.id, 0))
    return worker


@pytest.mark.parametrize(
    "router",
    [llmd.PowerOfTwo(), llmd.RoundRobin(), llmd.LeastDelay()],
    ids=lambda router: type(router).__name__,
)
def test_a_fork_decides_as_the_cluster_would(router):
    cluster = filled(router)
    twin, other = cluster.fork(), cluster.fork()
    before = cluster.view.workers.running_requests.copy()
    went = [arrive(twin, row, 10.0 + row) for row in range(50, 80)]
    assert (cluster.view.workers.running_requests == before).all()
    assert twin.view.workers.running_requests.sum() == before.sum() + 30
    assert [arrive(other, row, 10.0 + row) for row in range(50, 80)] == went
    assert [arrive(cluster, row, 10.0 + row) for row in range(50, 80)] == went


def test_a_fork_has_no_observer():
    seen = []
    cluster = llmd.Cluster(observer=seen.append)
    twin = cluster.fork()
    twin.handle(e.WorkerJoined(0.0, llmd.Worker(id="a")))
    assert not seen
    assert not len(cluster.view.workers)


class Counting(llmd.LeastDelay):
    """A plain subclass of a slotted class, with a list of its own."""

    def __init__(self):
        super().__init__(always=2.0)
        self.seen = []

    def cost(self, request, view):
        self.seen.append(request.id)
        return super().cost(request, view)


def test_what_a_subclass_sets_on_itself_is_copied_too():
    cluster = llmd.Cluster(router=Counting())
    cluster.router.seen.append("before")
    twin = cluster.fork()
    assert twin.router.seen == ["before"]
    assert twin.router.always == 2.0
    twin.router.seen.append("after")
    assert cluster.router.seen == ["before"]
