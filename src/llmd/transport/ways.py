"""Which way KV can go between two workers, told before either starts."""

from __future__ import annotations

import enum

import attrs

from ..errors import NoWay
from ..machines import Detected


class Way(enum.Enum):
    """How bytes get from one worker's cache to another's, best first."""

    IPC = "one maps the other's GPU memory"
    HOST = "through host memory"
    NETWORK = "over the network, from GPU to GPU"
    NETWORK_HOST = "over the network, through host memory"


@attrs.frozen(kw_only=True)
class Place:
    """Where a worker runs.

    Attributes:
        host: Name of the machine.
        device: Its GPU as `llmd.machines.detect` tells it; None for a CPU.
        ipc_namespace: Processes that do not share one cannot share memory.
        rdma: An RDMA device is there.
    """

    host: str
    device: Detected | None = None
    ipc_namespace: str = ""
    rdma: bool = False


@attrs.frozen
class Choice:
    """A way and why it is no better one.

    Attributes:
        way: To take.
        reasons: What rules each better way out, in words.
    """

    way: Way
    reasons: tuple[str, ...] = ()


def choose_way(source: Place, target: Place, *, allow_host: bool = True) -> Choice:
    """Choose the best way that can work.

    Args:
        source: Where the KV is.
        target: Where it must go.
        allow_host: Bytes may be staged in host memory.

    Raises:
        NoWay: None can; the message names what rules each out.

    >>> choose_way(Place(host="a"), Place(host="a")).way
    <Way.HOST: 'through host memory'>
    """
    reasons: list[str] = []
    if source.host == target.host:
        why_not = _why_no_ipc(source, target)
        if not why_not:
            return Choice(Way.IPC)
        reasons.append(why_not)
        if not allow_host:
            reasons.append("staging in host memory is not allowed")
        elif source.ipc_namespace == target.ipc_namespace:
            return Choice(Way.HOST, tuple(reasons))
        else:
            reasons.append("the processes share no IPC namespace")
    if source.rdma and target.rdma and source.device and target.device:
        return Choice(Way.NETWORK, tuple(reasons))
    reasons.append("there is no RDMA device at both ends")
    if allow_host:
        return Choice(Way.NETWORK_HOST, tuple(reasons))
    raise NoWay(
        f"no KV can go from {source.host} to {target.host}: {'; '.join(reasons)}"
    )


def _why_no_ipc(source: Place, target: Place) -> str:
    if source.device is None or target.device is None:
        return "the KV is in host memory at one end"
    if source.ipc_namespace != target.ipc_namespace:
        return "the processes share no IPC namespace"
    return source.device.why_no_ipc(target.device)
