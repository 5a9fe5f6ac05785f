"""The sending side: offers, and the writes that peers ask for."""

from __future__ import annotations

from itertools import count

import attrs

from .frames import Frame, Kind, about
from .interface import Offer, PeerId, Side, TransferId
from .outbox import Outbox, Settings, Sums
from .outgoing import Outgoing

_LONGEST_NUMBER = 12


@attrs.define
class Loose:
    """A failed offer whose peer must not be told so yet."""

    peer: PeerId
    reason: str
    tokens: set[int]


@attrs.define(eq=False)
class Sources:
    """All offers of an endpoint.

    Writes to a peer that hangs are loose: the blocks they read are free, which
    costs nobody anything but bytes that are thrown away.  The blocks they write
    are not, so the peer hears FAIL only when the driver has seen the end of all.

    Attributes:
        offers: Those not over.
        flying: Offers with a write that has not ended, by its token.
        loose: Offers that are over here, with writes that may still land.
    """

    layers: int
    piece_blocks: int
    sums: Sums | None
    settings: Settings
    outbox: Outbox
    offers: dict[TransferId, Outgoing] = attrs.field(factory=dict)
    flying: dict[int, Outgoing] = attrs.field(factory=dict)
    loose: dict[TransferId, Loose] = attrs.field(factory=dict)
    _early: dict[TransferId, tuple[PeerId, Frame, float]] = attrs.field(factory=dict)
    _aborted: dict[TransferId, None] = attrs.field(factory=dict)
    _tokens: count[int] = attrs.field(factory=count)
    _eager: dict[TransferId, Outgoing] = attrs.field(factory=dict)

    def offer(self, offer: Offer, now: float) -> None:
        """Begin an offer; serve who asked for it early."""
        outgoing = Outgoing(offer, self.layers, now + offer.timeout_s)
        self.offers[offer.id] = outgoing
        if offer.id in self._aborted:
            self.fail(outgoing, "given up before it was offered", now)
            return
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
        outgoing, left_s = self.offers.get(frame.id), _seconds(frame.text)
        if left_s is None:
            self.outbox.counts["forged"] += 1
            self._refuse(peer, frame.id, "the time left is no number")
        elif outgoing is None:
            full = len(self._early) >= self.settings.early_asks
            if frame.layer and not full and frame.id not in self._aborted:
                self._early[frame.id] = (peer, frame, now + left_s)
            else:
                self._refuse(peer, frame.id, "not offered, or lapsed")
        elif outgoing.peer is None:
            why_not = outgoing.ask(peer, frame, self.piece_blocks)
            if why_not is not None:
                self._refuse(peer, frame.id, why_not)
            else:
                # The target's deadline decides; this one is for one that is gone.
                outgoing.ends_at = now + left_s + self.settings.silence_s
            self._note(outgoing)
            self._settle(outgoing, now)
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
            self._landed(token)
            return
        del outgoing.flying[token]
        if error is None:
            self._settle(outgoing, now)
        else:
            self.fail(outgoing, error, now)

    def lost(self, peer: PeerId, reason: str, now: float) -> None:
        """Give up what *peer* asked for, and let go of what is in flight to it."""
        for outgoing in [out for out in self.offers.values() if out.peer == peer]:
            if outgoing.flying:
                tokens = set(outgoing.flying)
                self.loose[outgoing.offer.id] = Loose(peer, reason, tokens)
                for token in tokens:
                    del self.flying[token]
                outgoing.flying.clear()
            self.fail(outgoing, reason, now)

    @property
    def loose_writes(self) -> int:
        """Writes that were let go of and may still land; any thread may ask."""
        return sum(len(loose.tokens) for loose in list(self.loose.values()))

    def asked_by(self) -> set[PeerId]:
        """Return the peers that wait for what is offered here, or is to be."""
        early = {peer for peer, _, _ in self._early.values()}
        return early | {out.peer for out in self.offers.values() if out.peer}

    def writing_to(self) -> set[PeerId]:
        """Return the peers that a write may still reach."""
        peers = {loose.peer for loose in self.loose.values()}
        return peers | {out.peer for out in self.flying.values() if out.peer}

    def tick(self, now: float) -> None:
        """Give up what has taken too long."""
        for outgoing in [out for out in self.offers.values() if out.ends_at <= now]:
            what = "nobody fetched it" if outgoing.peer is None else "not acknowledged"
            self.fail(outgoing, f"{what} in time", now)
        for id, (peer, _, until) in list(self._early.items()):
            if until <= now:
                del self._early[id]
                self._refuse(peer, id, "not offered in time")

    def pump(self) -> bool:
        """Put a piece in flight if there is room, one of each offer in turn."""
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
            return True
        return False

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

    def _landed(self, token: int) -> None:
        """Take in the end of a write that was let go of."""
        for id, loose in self.loose.items():
            if token in loose.tokens:
                loose.tokens.discard(token)
                if not loose.tokens:
                    del self.loose[id]
                    self._refuse(loose.peer, id, loose.reason)
                return

    def _refuse(self, peer: PeerId, id: TransferId, reason: str) -> None:
        """Say that no write of *id* can land at *peer*, if that is so."""
        loose = self.loose.get(id)
        if loose is not None and loose.peer == peer:
            return  # `_landed` will say so
        self.outbox.send(peer, about(Kind.FAIL, id, reason))


def _seconds(text: bytes) -> float | None:
    """Return the time that a peer says is left; None if it says something else."""
    if len(text) > _LONGEST_NUMBER or not text.isdigit():
        return None
    return int(text) / 1e3
