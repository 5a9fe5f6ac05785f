"""One offer: what of it was asked for, is written, and has been acknowledged."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import attrs
import numpy as np
from numpy.typing import NDArray

from .frames import Frame, Kind
from .interface import Offer, PeerId
from .outbox import Blocks, Sums, Write


class Piece(NamedTuple):
    """A run of blocks of some layers, written at once."""

    layer: int
    start: int
    blocks: int
    attempt: int = 0
    layers: int = 1

    def then(self, other: Piece, piece_blocks: int) -> Piece | None:
        """Return both as one, if *other* is the same run of the next layer."""
        adjacent = other.layer == self.layer + self.layers
        alike = (self.start, self.blocks, self.attempt) == (
            other.start,
            other.blocks,
            other.attempt,
        )
        layers = self.layers + other.layers
        if adjacent and alike and layers * self.blocks <= piece_blocks:
            return Piece(self.layer, self.start, self.blocks, self.attempt, layers)
        return None


@attrs.define(eq=False)
class Outgoing:
    """One offer, from `offer` until its blocks are free.

    offered -> asked -> every block acknowledged -> free
       |         |
       +---------+-> failed -> no write in flight -> free

    Attributes:
        offer: It.
        layers: Layers of the slab.
        ends_at: When it is given up.
        peer: Who asked for it.
        error: Why it failed.
        flying: Writes not ended yet, by token.
        retransmitted_blocks: Blocks sent more than once.
    """

    offer: Offer
    layers: int
    ends_at: float
    peer: PeerId | None = None
    error: str | None = None
    flying: dict[int, Piece] = attrs.field(factory=dict)
    retransmitted_blocks: int = 0
    _source: Blocks = attrs.field(init=False)
    _target: Blocks = attrs.field(factory=lambda: np.empty(0, dtype=np.int32))
    _ready: set[int] = attrs.field(factory=set)
    _queue: deque[Piece] = attrs.field(factory=deque)
    _left: NDArray[np.bool_] | None = None
    _missing: int = 0

    def __attrs_post_init__(self) -> None:
        self._source = np.array(self.offer.blocks, dtype=np.int32)

    def ask(self, peer: PeerId, frame: Frame, piece_blocks: int) -> str | None:
        """Take in what the peer wants; return why it cannot be, if so."""
        wanted = len(frame.values) // 8
        if wanted > len(self.offer.blocks) - frame.start:
            return (
                f"{wanted} blocks from {frame.start} on, {len(self.offer.blocks)} are"
            )
        self.peer = peer
        self._source = self._source[frame.start : frame.start + wanted]
        self._target = frame.numbers.astype(np.int32)
        self._left = np.ones((self.layers, wanted), dtype=np.bool_)
        self._missing = self.layers * wanted
        if not wanted:
            return None
        if self.offer.ready:
            self._cut(0, self.layers, piece_blocks)
        for layer in sorted(self._ready):
            self._cut(layer, 1, piece_blocks)
        return None

    def ready(self, layer: int, piece_blocks: int) -> None:
        """Let a layer go."""
        if self.offer.ready or layer in self._ready:
            return
        self._ready.add(layer)
        if self._left is not None:
            self._cut(layer, 1, piece_blocks)

    def next_piece(self, piece_blocks: int) -> Piece | None:
        """Return what to write next, as much as may be at once, if anything."""
        if not self.eager:
            return None
        piece = self._queue.popleft()
        while self._queue:
            more = piece.then(self._queue[0], piece_blocks)
            if more is None:
                break
            piece = more
            self._queue.popleft()
        return piece

    def write(self, token: int, piece: Piece, sums: Sums | None) -> Write:
        """Put a piece in flight."""
        assert self.peer is not None, "a piece was cut before anybody asked"
        self.flying[token] = piece
        source, target = self._source, self._target
        if piece.blocks < len(target):
            run = slice(piece.start, piece.start + piece.blocks)
            source, target = source[run], target[run]
        words = b""
        if sums is not None:
            words = bytes(sums(piece.layer, piece.layer + piece.layers, source))
        frame = Frame(
            Kind.DATA,
            self.offer.id,
            piece.layer,
            piece.attempt,
            piece.start,
            words,
            b"",
            piece.layers,
            piece.blocks,
        )
        return Write(token, self.peer, piece.layer, piece.layers, source, target, frame)

    def answered(self, frame: Frame, max_attempts: int) -> None:
        """Take in an ACK or a NACK."""
        if self._left is None or frame.layer + frame.layers > self.layers:
            return
        rows = slice(frame.layer, frame.layer + frame.layers)
        left = self._left[rows, frame.start : frame.start + frame.blocks]
        if frame.kind is Kind.NACK and frame.attempt + 1 >= max_attempts:
            self.error = f"blocks arrived damaged {max_attempts} times"
            return
        again = np.zeros(left.shape, dtype=np.bool_)
        if frame.kind is Kind.NACK:
            damaged = frame.numbers
            if len(damaged) and damaged.max() >= again.size:
                return
            again.flat[damaged.astype(np.int64)] = True
            self._again(frame, again)
        self._missing -= int(np.count_nonzero(left & ~again))
        left &= again

    def _again(self, frame: Frame, damaged: NDArray[np.bool_]) -> None:
        """Queue damaged blocks, (layers, blocks), once more, ahead of others."""
        for row, column in enumerate(damaged):
            for start, stop in _runs(np.flatnonzero(column)):
                piece = Piece(
                    frame.layer + row,
                    frame.start + start,
                    stop - start,
                    frame.attempt + 1,
                )
                self._queue.appendleft(piece)
                self.retransmitted_blocks += piece.blocks

    @property
    def over(self) -> bool:
        """Nothing of it is in flight or will be."""
        if self.flying:
            return False
        done = self._left is not None and not self._missing
        return done or self.error is not None

    @property
    def eager(self) -> bool:
        """There is something to write."""
        return bool(self._queue) and self.error is None

    def _cut(self, layer: int, layers: int, piece_blocks: int) -> None:
        """Queue some layers, as many at once as one piece takes."""
        wanted, stop = len(self._target), layer + layers
        if layers * wanted <= piece_blocks:
            self._queue.append(Piece(layer, 0, wanted, 0, layers))
            return
        together = max(1, piece_blocks // wanted)
        for first in range(layer, stop, together):
            for start in range(0, wanted, piece_blocks):
                blocks = min(piece_blocks, wanted - start)
                count = min(together, stop - first)
                self._queue.append(Piece(first, start, blocks, layers=count))


def _runs(positions: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return the (start, stop) of each run of consecutive *positions*, sorted."""
    if not len(positions):
        return []
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(positions, breaks)]
