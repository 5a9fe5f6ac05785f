"""A transport within one process, at a modelled speed; also the simulator's."""

from __future__ import annotations

import heapq
import itertools
import secrets
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from ..errors import TransferError
from .endpoint import Endpoint
from .frames import Words
from .handshake import Address
from .interface import (
    Fetch,
    KVTransport,
    Layout,
    Offer,
    PeerId,
    Report,
    TransferId,
    as_id,
    as_index,
)
from .outbox import Blocks, Drop, Effect, Listen, Meet, Send, Settings, Write


@attrs.define(eq=False)
class LocalLink:
    """What joins the transports of one process, and how fast it is.

    Attributes:
        clock: Returns the time, in seconds.
        bytes_per_s: One write at a time goes over the link.
        latency_s: From one end to the other.
        key: Shared by those it joins.

    >>> LocalLink(clock=lambda: 0.0).latency_s
    0.0
    """

    clock: Callable[[], float]
    bytes_per_s: float = np.inf
    latency_s: float = 0.0
    key: bytes = attrs.field(factory=lambda: secrets.token_bytes(32), repr=False)
    _ends: dict[PeerId, LocalTransport] = attrs.field(factory=dict, init=False)
    _due: list[tuple[float, int, Callable[[], None]]] = attrs.field(
        factory=list, init=False
    )
    _busy_until: float = attrs.field(default=-np.inf, init=False)
    _happening: float | None = attrs.field(default=None, init=False)
    _order: Any = attrs.field(factory=itertools.count, init=False)

    def at(self, when: float, act: Callable[[], None]) -> None:
        """Let *act* happen at *when*; equal times keep their order."""
        heapq.heappush(self._due, (when, next(self._order), act))

    def reserve(self, moved_bytes: int) -> float:
        """Take the link for a write and return when its last byte arrives."""
        begin = max(self.now(), self._busy_until)
        self._busy_until = begin + moved_bytes / self.bytes_per_s
        return self._busy_until + self.latency_s

    def now(self) -> float:
        """Return the time of what happens just now, which may be seen late."""
        return self.clock() if self._happening is None else self._happening

    def run(self) -> None:
        """Let everything happen that is due, each at its own time."""
        until = self.clock()
        while self._due and self._due[0][0] <= until:
            self._happening, _, act = heapq.heappop(self._due)
            act()
        self._happening = None

    def next_at(self) -> float:
        """Return when the next thing is due; infinity for never."""
        return self._due[0][0] if self._due else np.inf


class LocalTransport(KVTransport):
    """Moves blocks between numpy slabs of one process over a `LocalLink`.

    Bytes are copied when the modelled write ends, not when it begins, so a
    block reused too early is found out here as it would be on a wire.

    >>> now = 0.0
    >>> link = LocalLink(clock=lambda: now, bytes_per_s=1e9)
    >>> layout = Layout(model="m", dtype="u8", layers=1, block_tokens=1,
    ...                 block_bytes=8)
    >>> a = LocalTransport(link, layout, np.ones((1, 4, 8), np.uint8))
    >>> b = LocalTransport(link, layout, np.zeros((1, 4, 8), np.uint8))
    >>> id = TransferId.fresh("r")
    >>> a.offer(Offer(id=id, blocks=[0, 1]))
    >>> b.fetch(Fetch(id=id, peer=b.connect(a.address()), blocks=[3, 2]))
    >>> now = 1.0
    >>> print(*(type(report).__name__ for report in b.poll()))
    TransferEnded BlocksFreed
    """

    def __init__(
        self,
        link: LocalLink,
        layout: Layout,
        slab: NDArray[np.uint8],
        *,
        settings: Settings | None = None,
        checksums: bool = True,
    ) -> None:
        """Join *link*.

        Args:
            link: What joins the transports.
            layout: Of the slab.
            slab: Shape (layers, blocks, block_bytes).
            settings: How transfers are cut, watched and retried.
            checksums: Check every block on arrival.

        Raises:
            TransferError: The slab has another shape than the layout says.
        """
        if slab.ndim != 3 or slab.shape[::2] != (layout.layers, layout.block_bytes):
            raise TransferError(f"a slab of shape {slab.shape} for {layout}")
        self._link, self._slab = link, slab
        self._closed = False
        blocks = slab.shape[1]
        name = uuid.uuid4().hex
        address = Address(id=name, layout=layout, blocks=blocks).sign(link.key)
        self._endpoint = Endpoint(
            name,
            link.key,
            layout,
            blocks,
            self._sums if checksums else None,
            settings or Settings(),
            address,
        )
        link._ends[name] = self

    @property
    def id(self) -> PeerId:
        return self._endpoint.id

    @property
    def counts(self) -> Mapping[str, int]:
        return held(self._endpoint)

    def address(self) -> bytes:
        return self._endpoint.address

    def connect(self, address: bytes) -> PeerId:
        endpoint = self._open()
        peer = Address.verify(address, endpoint.key, endpoint.layout).id
        endpoint.meet(peer, self._link.now())
        self._carry()
        return peer

    def offer(self, offer: Offer) -> None:
        self._open().offer(offer, self._link.now())
        self._carry()

    def ready(self, id: TransferId, layer: int) -> None:
        self._open().ready(as_id(id), as_index(layer))
        self._carry()

    def fetch(self, fetch: Fetch) -> None:
        self._open().fetch(fetch, self._link.now())
        self._carry()

    def cancel(self, id: TransferId, reason: str = "cancelled") -> None:
        self._open().cancel(as_id(id), str(reason), self._link.now())
        self._carry()

    def poll(self) -> list[Report]:
        self._link.run()
        if not self._closed:
            self._endpoint.tick(self._link.now())
            self._carry()
            self._link.run()
        return drain(self._endpoint)

    def close(self) -> None:
        """Leave the link at once: in one process nothing is ever in flight late."""
        if self._closed:
            return
        self._closed = True
        del self._link._ends[self.id]
        now = self._link.now()
        for peer in list(self._endpoint.peers):
            self._endpoint.died(peer, "this transport closed", now)
            end = self._link._ends.get(peer)
            if end is not None:
                end._endpoint.died(self.id, "the peer closed", now)
        self._endpoint.close(now)
        self._endpoint.outbox.effects.clear()

    def _open(self) -> Endpoint:
        if self._closed:
            raise TransferError("the transport is closed")
        return self._endpoint

    def _carry(self) -> None:
        effects = self._endpoint.outbox.effects
        while self._endpoint.pump() or effects:
            while effects:
                self._do(effects.popleft())

    def _do(self, effect: Effect) -> None:
        link, mine = self._link, self._endpoint
        match effect:
            case Send(peer=peer, frame=frame):
                data = frame.seal(mine.key, mine.id, peer)
                link.at(link.now() + link.latency_s, lambda: self._send(peer, data))
            case Write():
                moved_blocks = len(effect.source) * effect.layers
                moved_bytes = moved_blocks * mine.layout.block_bytes
                link.at(link.reserve(moved_bytes), lambda: self._write(effect))
            case Meet(peer=peer, address=address):
                try:
                    Address.verify(address, mine.key, mine.layout)
                except TransferError as error:
                    mine.died(peer, str(error), link.now())
            case Drop() | Listen():
                pass

    def _send(self, peer: PeerId, data: bytes) -> None:
        end, now = self._link._ends.get(peer), self._link.now()
        if end is None:
            self._endpoint.died(peer, "the peer is gone", now)
        else:
            end._endpoint.heard(self.id, data, now)
            end._carry()
        self._carry()

    def _write(self, write: Write) -> None:
        end, mine = self._link._ends.get(write.peer), self._endpoint
        if self._closed:
            return
        if end is not None:
            layers = slice(write.layer, write.layer + write.layers)
            end._slab[layers, write.target] = self._slab[layers, write.source]
            self._send(write.peer, write.frame.seal(mine.key, mine.id, write.peer))
        error = None if end is not None else "the peer is gone"
        mine.wrote(write.token, error, self._link.now())
        self._carry()

    def _sums(self, first: int, last: int, blocks: Blocks) -> Words:
        held = self._slab[first:last, blocks]
        return multilinear(held.reshape(-1, held.shape[2]))


def multilinear(blocks: NDArray[np.uint8]) -> Words:
    """Checksum *blocks*, shape (n, bytes), at the speed of numpy; shape (n,)."""
    padded = -blocks.shape[1] % 8
    words = np.pad(blocks, ((0, 0), (0, padded))).view(np.uint64)
    rng = np.random.default_rng(words.shape[1])
    odd = rng.integers(0, 1 << 63, words.shape[1], dtype=np.uint64) * 2 + 1
    sums: Words = (words * odd).sum(axis=1, dtype=np.uint64)
    return sums


def held(endpoint: Endpoint) -> Mapping[str, int]:
    """Return the totals of an endpoint and what it holds now."""
    sources, targets = endpoint.sources, endpoint.targets
    return {
        **endpoint.outbox.counts,
        "offers": len(sources.offers),
        "fetches": len(targets.fetches),
        "writes": len(sources.flying) + sources.loose_writes,
        "quarantined_blocks": len(targets.taken),
        "peers": len(endpoint.peers),
    }


def drain(endpoint: Endpoint) -> list[Report]:
    """Take the reports away."""
    reports = list(endpoint.outbox.reports)
    endpoint.outbox.reports.clear()
    return reports
