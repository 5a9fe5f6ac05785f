"""The sockets that bring vLLM's KV events: a subscriber, and one for replays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import attrs
import zmq.asyncio
from zmq.constants import SocketOption, SocketType

from .kv_events import END, Gap, KVEventDecoder
from .kv_holdings import Report

# Batches handled before other tasks of the loop get their turn.
_TURN = 16


@attrs.frozen
class KVEndpoint:
    """Where one publisher is found.

    Attributes:
        events: ZMQ address of its PUB socket.
        replay: Of its replay socket; empty if it has none.
        topic: Prefix of the topics to take; empty for all.
        bind: This side binds *events*, because the publisher connects: vLLM
            binds only addresses with `*` or `::`, and ipc.
    """

    events: str
    replay: str = ""
    topic: str = ""
    bind: bool = False


class KVEventStream:
    """Feeds one publisher's batches to a decoder and pushes what it reports.

    It begins with a replay, so that an engine that has run for a while is known
    as far back as its buffer goes.  What is not yet read waits in ZMQ's queue,
    which drops batches when full; the decoder sees the gap.

    Args:
        decoder: May be shared by the ranks of one engine.
        push: Takes each report, on the event loop; must not block.
        endpoint: Where the publisher is.
        batches_queued: Bound of ZMQ's queue.
        replay_timeout: Seconds for one replay, after which what is missing
            counts as lost.
    """

    def __init__(
        self,
        decoder: KVEventDecoder,
        push: Callable[[Report], None],
        endpoint: KVEndpoint,
        *,
        batches_queued: int = 100_000,
        replay_timeout: float = 5.0,
    ) -> None:
        self.decoder = decoder
        self._push = push
        self._endpoint = endpoint
        self._batches_queued = batches_queued
        self._replay_timeout = replay_timeout
        self._context: zmq.asyncio.Context | None = None
        self._events: zmq.asyncio.Socket | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Subscribe; reports follow until `close`."""
        self._context = zmq.asyncio.Context()
        socket = self._socket(SocketType.SUB, self._batches_queued)
        socket.setsockopt(SocketOption.SUBSCRIBE, self._endpoint.topic.encode())
        if self._endpoint.bind:
            socket.bind(self._endpoint.events)
        else:
            socket.connect(self._endpoint.events)
        self._events = socket
        self._task = asyncio.create_task(self._run(socket), name="llmd-kv-events")

    async def close(self) -> None:
        """Stop reporting and free the sockets; idempotent."""
        task, self._task = self._task, None
        try:
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        finally:
            if self._context is not None:
                self._context.destroy(linger=0)
                self._context = self._events = None

    async def _run(self, socket: zmq.asyncio.Socket) -> None:
        await self._replay(Gap(0, 0, 0))
        taken = 0
        while True:
            frames = await socket.recv_multipart()
            self._feed(frames)
            if self.decoder.gap:
                await self._replay(self.decoder.gap)
                self._feed(frames, final=True)
            taken += 1
            if taken % _TURN == 0:
                # A socket with messages waiting never suspends.
                await asyncio.sleep(0)

    async def _replay(self, gap: Gap) -> None:
        """Feed what the publisher still has from the gap on."""
        if not self._endpoint.replay:
            return
        socket = self._socket(SocketType.DEALER, 0)
        try:
            socket.connect(self._endpoint.replay)
            async with asyncio.timeout(self._replay_timeout):
                await socket.send_multipart([b"", gap.start.to_bytes(8, "big")])
                while (frames := await socket.recv_multipart())[-2] != END:
                    self._feed(frames, replayed=True)
        except (TimeoutError, IndexError):
            self.decoder.counts["broken replays"] += 1
        finally:
            socket.close(linger=0)

    def _feed(
        self, frames: Sequence[bytes], *, replayed: bool = False, final: bool = False
    ) -> None:
        at = asyncio.get_running_loop().time()
        for report in self.decoder.feed(frames, at, replayed=replayed, final=final):
            self._push(report)

    def _socket(self, kind: SocketType, queued: int) -> zmq.asyncio.Socket:
        if self._context is None:
            raise RuntimeError("the stream is not started")
        socket = self._context.socket(kind)
        # 0 is no bound: a replay is bounded by the publisher's own buffer.
        socket.setsockopt(SocketOption.RCVHWM, queued)
        return socket
