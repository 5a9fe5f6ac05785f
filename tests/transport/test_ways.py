"""Which way KV can go, and what rules the better ones out."""

import itertools

import attrs
import pytest

from llmd.errors import NoWay
from llmd.machines import Answers, detect
from llmd.transport import Place, Way, choose_way

GPU = Answers(
    name="NVIDIA H200",
    memory_bytes=150_754_820_096,
    compute_capability=(9, 0),
    c2c=False,
    uuid="GPU-1",
)


def gpu(**facts):
    return detect(attrs.evolve(GPU, **facts))


ONE, OTHER = gpu(), gpu(uuid="GPU-2")
MIGS = [gpu(uuid=f"MIG-{i}", mig_instance=True, parent_uuid="GPU-1") for i in (1, 2)]


def place(device=ONE, host="a", **facts):
    return Place(host=host, device=device, **facts)


@pytest.mark.parametrize(
    ("source", "target", "way", "words"),
    [
        (place(), place(OTHER), Way.IPC, []),
        (place(MIGS[0]), place(MIGS[0]), Way.IPC, []),
        (place(MIGS[0]), place(MIGS[1]), Way.HOST, ["MIG instance"]),
        (place(), place(MIGS[1]), Way.HOST, ["MIG instance"]),
        (place(), place(None), Way.HOST, ["host memory at one end"]),
        (
            place(ipc_namespace="x"),
            place(ipc_namespace="y"),
            Way.NETWORK_HOST,
            ["IPC namespace", "no RDMA"],
        ),
        (
            place(ipc_namespace="x", rdma=True),
            place(ipc_namespace="y", rdma=True),
            Way.NETWORK,
            ["IPC namespace"],
        ),
        (place(rdma=True), place(OTHER, "b", rdma=True), Way.NETWORK, []),
        (place(rdma=True), place(OTHER, "b"), Way.NETWORK_HOST, ["no RDMA"]),
        (place(rdma=True), place(None, "b", rdma=True), Way.NETWORK_HOST, ["no RDMA"]),
    ],
)
def test_the_best_way_that_can_work_is_taken(source, target, way, words):
    for one, other in (source, target), (target, source):
        choice = choose_way(one, other)
        assert choice.way is way
        said = "; ".join(choice.reasons)
        assert all(word in said for word in words)
        assert bool(choice.reasons) == bool(words)


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        (place(MIGS[0]), place(MIGS[1]), ["MIG instance", "not allowed", "no RDMA"]),
        (place(None), place(None), ["host memory at one end", "not allowed"]),
        (place(), place(OTHER, "b"), ["no RDMA"]),
    ],
)
def test_where_there_is_none_it_says_why(source, target, words):
    for one, other in itertools.permutations((source, target)):
        with pytest.raises(NoWay) as refused:
            choose_way(one, other, allow_host=False)
        assert all(word in str(refused.value) for word in words)
