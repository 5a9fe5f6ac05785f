"""The sending side: offers, and the writes that peers ask for."""

from __future__ import annotations

from collections import deque
from itertools import count

import attrs
import numpy as np
from numpy.typing import NDArray

from .frames import Frame, Kind, Words, about
from .interface import Offer, PeerId, Side, TransferId
from .outbox import Blocks, Outbox, Settings, Sums, Write

_NO_SUMS: Words = np.empty(0, dtype=np.uint64)


@attrs.frozen
class Piece:
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
            return attrs.evolve(self, layers=layers)
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
    _target: Blocks = attrs.field(factory=lambda: np.empty(0, dtype=np.int64))
    _ready: set[int] = attrs.field(factory=set)
    _queue: deque[Piece] = attrs.field(factory=deque)
    _left: NDArray[np.bool_] | None = None
    _missing: int = 0

    def __attrs_post_init__(self) -> None:
        self._source = np.array(self.offer.blocks, dtype=np.int64)

    def ask(self, peer: PeerId, frame: Frame, piece_blocks: int) -> str | None:
        """Take in what the peer wants; return why it cannot be, if so."""
        wanted = len(frame.values)
        if not 0 < wanted <= len(self.offer.blocks) - frame.start:
            return (
                f"{wanted} blocks from {frame.start} on, {len(self.offer.blocks)} are"
            )
        self.peer, self._source = peer, self._source[frame.start :]
        self._target = frame.values.astype(np.int64)
        self._left = np.ones((self.layers, wanted), dtype=np.bool_)
        self._missing = self.layers * wanted
        ready = range(self.layers) if self.offer.ready else sorted(self._ready)
        for layer in ready:
            self._cut(layer, piece_blocks)
        return None

    def ready(self, layer: int, piece_blocks: int) -> None:
        """Let a layer go."""
        if self.offer.ready or layer in self._ready:
            return
        self._ready.add(layer)
        if self._left is not None:
            self._cut(layer, piece_blocks)

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
        stop = piece.start + piece.blocks
        source = self._source[piece.start : stop]
        words = _NO_SUMS
        if sums is not None:
            words = sums(piece.layer, piece.layer + piece.layers, source)
        frame = Frame(
            Kind.DATA,
            self.offer.id.request,
            self.offer.id.generation,
            piece.layer,
            piece.attempt,
            piece.start,
            words,
            layers=piece.layers,
            blocks=piece.blocks,
        )
        target = self._target[piece.start : stop]
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
            again.flat[frame.values.astype(np.int64)] = True
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

    def _cut(self, layer: int, piece_blocks: int) -> None:
        wanted = len(self._target)
        for start in range(0, wanted, piece_blocks):
            blocks = min(piece_blocks, wanted - start)
            self._queue.append(Piece(layer, start, blocks))


@attrs.define(eq=False)
class Sources:
    """All offers of an endpoint."""

    layers: int
    piece_blocks: int
    sums: Sums | None
    settings: Settings
    outbox: Outbox
    offers: dict[TransferId, Outgoing] = attrs.field(factory=dict)
    flying: dict[int, Outgoing] = attrs.field(factory=dict)
    _early: dict[TransferId, tuple[PeerId, Frame, float]] = attrs.field(factory=dict)
    _aborted: dict[TransferId, None] = attrs.field(factory=dict)
    _tokens: count[int] = attrs.field(factory=count)
    _eager: dict[TransferId, Outgoing] = attrs.field(factory=dict)

    def offer(self, offer: Offer, now: float) -> None:
        """Begin an offer; serve who asked for it early."""
        outgoing = Outgoing(offer, self.layers, now + offer.timeout_s)
        self.offers[offer.id] = outgoing
        early = self._early.pop(offer.id, None)
        if early is not None:
            self.ask(early[0], early[1], now)

    def ready(self, id: TransferId, layer: int) -> None:
        """Let a layer of an offer go; one that has ended is ignored."""
        outgoing = self.offers.get(id)
        if outgoing is not None and 0 <= layer < self.layers:
            outgoing.ready(layer, self.piece_blocks)
            self._note(outgoing)

    def ask(self, peer: PeerId, frame: Frame, now: float) -> None:
        """Serve a peer, or tell it why not."""
        outgoing = self.offers.get(frame.id)
        left_s = int(frame.text or b"0") / 1e3
        if outgoing is None:
            full = len(self._early) >= self.settings.early_asks
            if frame.layer and not full and frame.id not in self._aborted:
                self._early[frame.id] = (peer, frame, now + left_s)
            else:
                self._refuse(peer, frame.id, "not offered, or lapsed")
        elif outgoing.peer is None:
            # The target's deadline decides; this one is for a target that is gone.
            outgoing.ends_at = now + left_s + self.settings.silence_s
            why_not = outgoing.ask(peer, frame, self.piece_blocks)
            if why_not is not None:
                self._refuse(peer, frame.id, why_not)
            self._note(outgoing)
        elif outgoing.peer != peer:
            self._refuse(peer, frame.id, "fetched by another peer")

    def answered(self, peer: PeerId, frame: Frame, now: float) -> None:
        """Take in an ACK or NACK of a peer."""
        outgoing = self.offers.get(frame.id)
        if outgoing is None or outgoing.peer != peer:
            self.outbox.counts["stale"] += 1
            return
        before = outgoing.error
        outgoing.answered(frame, self.settings.max_attempts)
        if outgoing.error is not None and before is None:
            self._ended(outgoing, now)
        self._note(outgoing)
        self._settle(outgoing, now)

    def abort(self, peer: PeerId, frame: Frame, now: float) -> None:
        """Stop for a peer; it hears FAIL when nothing is in flight."""
        self._early.pop(frame.id, None)
        # An ASK that this ABORT overtook must not be served any more.
        self._bury(frame.id)
        outgoing = self.offers.get(frame.id)
        if outgoing is None or outgoing.peer not in (None, peer):
            self._refuse(peer, frame.id, "nothing is in flight")
            return
        outgoing.peer = peer
        self.fail(outgoing, frame.text.decode(errors="replace"), now)

    def never(self, id: TransferId, reason: str) -> None:
        """Refuse whoever asked early, or will ask, for what is not to come."""
        self._bury(id)
        early = self._early.pop(id, None)
        if early is not None:
            self._refuse(early[0], id, reason)

    def fail(self, outgoing: Outgoing, reason: str, now: float) -> None:
        """Give an offer up."""
        if outgoing.error is None:
            outgoing.error = reason
            self._ended(outgoing, now)
        self._settle(outgoing, now)

    def wrote(self, token: int, error: str | None, now: float) -> None:
        """Take in the end of a write."""
        outgoing = self.flying.pop(token, None)
        if outgoing is None:
            return
        del outgoing.flying[token]
        if error is None:
            self._settle(outgoing, now)
        else:
            self.fail(outgoing, error, now)

    def lost(self, peer: PeerId, reason: str, now: float, *, cut: bool) -> None:
        """Give up what *peer* asked for; *cut*: nothing can be in flight."""
        for outgoing in [out for out in self.offers.values() if out.peer == peer]:
            if cut:
                for token in outgoing.flying:
                    del self.flying[token]
                outgoing.flying.clear()
            self.fail(outgoing, reason, now)

    def tick(self, now: float) -> None:
        """Give up what has taken too long."""
        for outgoing in [out for out in self.offers.values() if out.ends_at <= now]:
            what = "nobody fetched it" if outgoing.peer is None else "not acknowledged"
            self.fail(outgoing, f"{what} in time", now)
        for id, (peer, _, until) in list(self._early.items()):
            if until <= now:
                del self._early[id]
                self._refuse(peer, id, "not offered in time")

    def pump(self) -> None:
        """Put pieces in flight while there is room, one of each offer in turn."""
        eager = self._eager
        while eager and len(self.flying) < self.settings.writes_in_flight:
            id = next(iter(eager))
            outgoing = eager.pop(id)
            piece = outgoing.next_piece(self.piece_blocks)
            if piece is None:
                continue
            token = next(self._tokens)
            self.flying[token] = outgoing
            self.outbox.effects.append(outgoing.write(token, piece, self.sums))
            if outgoing.eager:
                eager[id] = outgoing  # behind the others

    def _settle(self, outgoing: Outgoing, now: float) -> None:
        """Free an offer that is over."""
        id = outgoing.offer.id
        if not outgoing.over or self.offers.get(id) is not outgoing:
            return
        del self.offers[id]
        self._eager.pop(id, None)
        if outgoing.error is None:
            self._ended(outgoing, now)
        elif outgoing.peer is not None:
            self._refuse(outgoing.peer, id, outgoing.error)
        self.outbox.freed(id, Side.SOURCE, now)

    def _ended(self, outgoing: Outgoing, now: float) -> None:
        self.outbox.ended(
            outgoing.offer.id,
            Side.SOURCE,
            now,
            outgoing.error,
            outgoing.retransmitted_blocks,
        )

    def _note(self, outgoing: Outgoing) -> None:
        if outgoing.eager:
            self._eager.setdefault(outgoing.offer.id, outgoing)

    def _bury(self, id: TransferId) -> None:
        self._aborted[id] = None
        if len(self._aborted) > self.settings.early_asks:
            del self._aborted[next(iter(self._aborted))]

    def _refuse(self, peer: PeerId, id: TransferId, reason: str) -> None:
        self.outbox.send(peer, about(Kind.FAIL, id, reason))


def _runs(positions: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return the (start, stop) of each run of consecutive *positions*, sorted."""
    if not len(positions):
        return []
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(positions, breaks)]
