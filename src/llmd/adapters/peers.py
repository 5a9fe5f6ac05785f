"""Routers that share a fleet tell each other what they booked, over ZeroMQ.

Each publishes on a PUB socket and subscribes to the others.  A message is one
JSON object; what cannot be read is counted and skipped, so that versions may
mix:

    {"v": 1, "peer": "...", "sequence": 7, "valid_s": 1.0,
     "loads": {"worker": [running, waiting, prefill tokens, context tokens]}}
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import attrs
import zmq.asyncio
from zmq.constants import SocketOption, SocketType

from ..cluster import Cluster
from ..events import Event, PeerReported
from ..types import Load

_log = logging.getLogger("llmd.peers")
_VERSION = 1
_WORKERS = 1 << 14
_MOST = 1 << 48
_QUEUED = 64


def encode(report: PeerReported) -> bytes:
    """Return the message that tells others of *report*.

    >>> report = PeerReported(0.0, "a", 1, {"w": Load(1, 1, 100, 100)})
    >>> decode(encode(report), at=5.0).loads["w"].prefill_tokens
    100
    """
    message = {
        "v": _VERSION,
        "peer": report.peer,
        "sequence": report.sequence,
        "valid_s": report.valid_s,
        "loads": report.loads,
    }
    return json.dumps(message, separators=(",", ":")).encode()


def decode(message: bytes, at: float) -> PeerReported:
    """Return what a message tells, as of *at* on our own clock.

    Raises:
        ValueError: It is no message of this version.
    """
    try:
        said = json.loads(message)
        if said["v"] != _VERSION or len(said["loads"]) > _WORKERS:
            raise ValueError("another version, or beyond any fleet")
        loads = {
            str(worker): Load(*map(_amount, cells))
            for worker, cells in said["loads"].items()
        }
        valid_s = float(said["valid_s"])
        if not 0 < valid_s < 3600:
            raise ValueError(f"valid for {valid_s} s")
        return PeerReported(
            at, str(said["peer"]), int(said["sequence"]), loads, valid_s
        )
    except (ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"not a report: {error!r}") from error
    except RecursionError as error:
        raise ValueError("not a report: nested too deep") from error


def _amount(cell: Any) -> int:
    """Return a cell of a load, which sums with others in 64 bits."""
    if not 0 <= cell < _MOST:
        raise ValueError(f"a load of {cell}")
    return int(cell)


@attrs.define(eq=False)
class PeerExchange:
    """Publishes the load of *cluster* and hands it that of its peers.

    A context manager; what it starts ends with it.  A peer that is slow or gone
    costs nothing: PUB sockets drop, they do not wait.

    Attributes:
        cluster: Whose books are told.
        handle: Takes the events for it, as `Server.handle` does.
        clock: That of *handle*'s events.
        bind: Where to publish; port 0 picks a free one, see `endpoint`.
        peers: Endpoints to listen to.
        interval: Seconds between two reports.
        valid_s: Seconds a report counts; several intervals, so that a lost one
            does no harm.
        name: Of this run; drawn if not given.
        counts: Reports sent, heard and unreadable.
    """

    cluster: Cluster
    handle: Callable[[Event], object]
    clock: Callable[[], float]
    bind: str = "tcp://127.0.0.1:0"
    peers: Sequence[str] = ()
    interval: float = 0.05
    valid_s: float = 1.0
    name: str = attrs.field(factory=lambda: secrets.token_hex(8))
    counts: Counter[str] = attrs.field(factory=Counter, init=False)
    endpoint: str = attrs.field(default="", init=False)
    _context: Any = attrs.field(default=None, init=False)
    _publisher: Any = attrs.field(default=None, init=False)
    _subscriber: Any = attrs.field(default=None, init=False)
    _tasks: list[asyncio.Task[None]] = attrs.field(factory=list, init=False)
    _sequence: int = attrs.field(default=0, init=False)

    async def __aenter__(self) -> PeerExchange:
        self._context = zmq.asyncio.Context()
        self._publisher = self._context.socket(SocketType.PUB)
        self._publisher.setsockopt(SocketOption.SNDHWM, _QUEUED)
        self._publisher.bind(self.bind)
        self.endpoint = self._publisher.getsockopt_string(SocketOption.LAST_ENDPOINT)
        self._subscriber = self._context.socket(SocketType.SUB)
        self._subscriber.setsockopt(SocketOption.RCVHWM, _QUEUED)
        self._subscriber.subscribe(b"")
        for peer in self.peers:
            self.listen(peer)
        self._tasks = [
            asyncio.create_task(self._tell()),
            asyncio.create_task(self._hear()),
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    def listen(self, endpoint: str) -> None:
        """Listen to one more peer, there or still to come."""
        if endpoint != self.endpoint:
            self._subscriber.connect(endpoint)

    def report(self) -> PeerReported:
        """Return what is to be told now."""
        self._sequence += 1
        loads = self.cluster.peers.own()
        return PeerReported(
            self.clock(), self.name, self._sequence, loads, self.valid_s
        )

    async def _tell(self) -> None:
        while True:
            await self._publisher.send(encode(self.report()))
            self.counts["sent"] += 1
            await asyncio.sleep(self.interval)

    async def _hear(self) -> None:
        while True:
            message = await self._subscriber.recv()
            try:
                event = decode(message, self.clock())
            except ValueError as error:
                self.counts["unreadable"] += 1
                _log.debug("skipped a message: %s", error)
                continue
            if event.peer != self.name:
                self.counts["heard"] += 1
                self.handle(event)
