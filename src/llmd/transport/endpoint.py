"""The protocol of a transport, with no input, output or clock of its own.

A driver carries bytes: it tells an `Endpoint` what was asked for, what arrived
and what time it is, carries out the effects that come back, and has it `pump`
for more.  The drivers are `llmd.transport.LocalTransport` and
`llmd.adapters.nixl.NixlTransport`.

    target                     source
      | -- HELLO, ASK ----------> |     blocks of the target
      | <== write, DATA ========= |     checksums of what was written
      | -- ACK or NACK ---------> |     a damaged block is written again
      |                           |
      | -- ABORT ---------------> |     deadline, cancel
      | <------------- FAIL ----- |     no write can land any more: reuse the blocks

Every frame names request, generation, layer and attempt; what matches none of
the four that are expected is stale and is dropped.
"""

from __future__ import annotations

import attrs

from ..errors import CircuitOpen, TransferError
from .breaker import CircuitBreaker
from .frames import Frame, Kind
from .interface import Fetch, Layout, Offer, PeerId, TransferId
from .outbox import Drop, Listen, Meet, Outbox, Settings, Sums
from .sources import Sources
from .targets import Targets

_HELLOS_TO_A_HUNG_PEER = 30
_LONG_HUNG_S = 60.0
"""Between frames to a peer that those did not wake: they queue up at it."""


@attrs.define(eq=False)
class Peer:
    """What is known of a peer.

    Attributes:
        heard_at: Last sign of life.
        sent_at: Last frame to it.
        hung: It has been silent for too long.
        hellos: Sent since it hung.
        breaker: Whether to try it at all.
    """

    heard_at: float
    sent_at: float = float("-inf")
    hung: bool = False
    hellos: int = 0
    breaker: CircuitBreaker = attrs.field(factory=CircuitBreaker)


@attrs.define(eq=False)
class Endpoint:
    """One end of every transfer of one slab.

    Attributes:
        id: Of the transport.
        key: Shared with all peers.
        layout: Of the slab.
        blocks: In each layer of it.
        sums: Checksums blocks of the slab; None trusts the carrier.
        summed_by_driver: It adds the checksums to what is said of a write.
        settings: How transfers are cut, watched and retried.
        address: What peers need to reach this one, signed.
        outbox: Effects and reports for the driver to take away.
        peers: Those met, by id.
    """

    id: PeerId
    key: bytes = attrs.field(repr=False)
    layout: Layout
    blocks: int
    sums: Sums | None = None
    settings: Settings = attrs.field(factory=Settings)
    address: bytes = b""
    summed_by_driver: bool = False
    outbox: Outbox = attrs.field(factory=Outbox, init=False)
    peers: dict[PeerId, Peer] = attrs.field(factory=dict, init=False)
    sources: Sources = attrs.field(init=False)
    targets: Targets = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        layers, settings = self.layout.layers, self.settings
        piece_blocks = max(1, settings.piece_bytes // self.layout.block_bytes)
        sent = None if self.summed_by_driver else self.sums
        self.sources = Sources(layers, piece_blocks, sent, settings, self.outbox)
        self.targets = Targets(layers, self.sums, settings, self.outbox)

    def meet(self, peer: PeerId, now: float) -> None:
        """Greet a peer that the driver can reach; known ones are left alone."""
        known = self.peers.get(peer)
        if known is None or known.hung:
            self.peers[peer] = Peer(now) if known is None else known
            self._greet(peer)

    def offer(self, offer: Offer, now: float) -> None:
        """Begin an offer; see `KVTransport.offer`."""
        self._check(offer.blocks)
        if offer.id in self.sources.offers:
            raise TransferError(f"{offer.id} is offered already")
        self.sources.offer(offer, now)

    def ready(self, id: TransferId, layer: int) -> None:
        """Let a layer of an offer go."""
        self.sources.ready(id, layer)

    def fetch(self, fetch: Fetch, now: float) -> None:
        """Begin a fetch; see `KVTransport.fetch`."""
        self._check(fetch.blocks)
        peer = self.peers.get(fetch.peer)
        if peer is None:
            raise TransferError(f"{fetch.peer} is not connected")
        if fetch.id in self.targets.fetches:
            raise TransferError(f"{fetch.id} is being fetched already")
        if not peer.breaker.allows(now):
            raise CircuitOpen(f"{fetch.peer} failed too often lately")
        if not self._with(fetch.peer):
            peer.heard_at = now
        self.targets.fetch(fetch, now)

    def cancel(self, id: TransferId, reason: str, now: float) -> None:
        """Give up a transfer, whichever end of it this is."""
        outgoing, incoming = self.sources.offers.get(id), self.targets.fetches.get(id)
        if outgoing is not None:
            self.sources.fail(outgoing, reason, now)
        if incoming is None:
            self.sources.never(id, reason)
        else:
            self.targets.fail(incoming, reason, now)

    def heard(self, sender: PeerId, data: bytes, now: float) -> None:
        """Take in a frame; one that is not sealed with the key is counted only."""
        try:
            frame = Frame.unseal(data, self.key, sender, self.id)
        except (TransferError, ValueError):
            self.outbox.counts["forged"] += 1
        else:
            self.take(sender, frame, now)

    def take(self, sender: PeerId, frame: Frame, now: float) -> None:
        """Take in a frame that is the sender's beyond doubt."""
        peer = self.peers.get(sender)
        if peer is None or (peer.hung and frame.kind is Kind.HELLO):
            if frame.kind is not Kind.HELLO:
                self.outbox.counts["stale"] += 1
                return
            peer = self.peers.setdefault(sender, Peer(now))
            self.outbox.effects.append(Meet(sender, frame.text))
        peer.heard_at, peer.hung, peer.hellos = now, False, 0
        self._act(sender, peer, frame, now)

    def wrote(self, token: int, error: str | None, now: float) -> None:
        """Take in the end of a write."""
        self.sources.wrote(token, error, now)

    def died(self, peer: PeerId, reason: str, now: float) -> None:
        """Give up all with a peer that can write no more, and forget it."""
        known = self.peers.pop(peer, None)
        if known is not None:
            self.outbox.counts["peers_lost"] += 1
        self.sources.lost(peer, reason, now)
        self.targets.lost(peer, reason, now, cut=True)

    def tick(self, now: float) -> None:
        """Look at deadlines and at signs of life."""
        self.sources.tick(now)
        for slow in self.targets.tick(now):
            self.peers[slow].breaker.failed(now)
        busy = self._busy()
        for id, peer in self.peers.items():
            if id in busy:
                self._watch(id, peer, now)
            elif now - max(peer.heard_at, peer.sent_at) >= self.settings.idle_s:
                # Who is dead cannot be sent to, which the driver tells `died`.
                peer.sent_at = now
                self.outbox.send(id, Frame(Kind.BEAT))

    def close(self, now: float, reason: str = "") -> None:
        """Give up everything; `goodbye` once nothing is in flight."""
        for outgoing in list(self.sources.offers.values()):
            self.sources.fail(outgoing, reason or "the source closes", now)
        for incoming in list(self.targets.fetches.values()):
            self.targets.fail(incoming, reason or "the target closes", now)

    def pump(self) -> bool:
        """Put one write in flight if there is something to write and room.

        A driver calls it when it has told all that there is to tell, and again
        when it has carried out what came of that: layers that are ready at the
        same time go in one write, and are checksummed while the last one flies.

        Returns:
            Whether it did.
        """
        return self.sources.pump()

    def goodbye(self) -> None:
        """Tell every peer that no write from here can reach it any more."""
        for peer in self.peers.keys() - self.sources.writing_to():
            self.outbox.send(peer, Frame(Kind.BYE))

    def _act(self, sender: PeerId, peer: Peer, frame: Frame, now: float) -> None:
        match frame.kind:
            case Kind.DATA:
                if self.targets.data(sender, frame, now):
                    peer.breaker.succeeded()
            case Kind.ASK:
                self.sources.ask(sender, frame, now)
            case Kind.ACK | Kind.NACK:
                self.sources.answered(sender, frame, now)
            case Kind.ABORT:
                self.sources.abort(sender, frame, now)
            case Kind.FAIL:
                self.targets.stopped(sender, frame, now)
            case Kind.MAIL:
                where = frame.text.decode(errors="replace")
                self.outbox.effects.append(Listen(sender, where))
            case Kind.BYE:
                self.outbox.effects.append(Drop(sender))
                self.died(sender, "the peer closed", now)

    def _watch(self, id: PeerId, peer: Peer, now: float) -> None:
        """Keep a peer that something is open with informed, and doubt it."""
        if peer.hung:
            # It may wake up with our blocks still in its hands: ask it to let go.
            # Or it dies at last, which only a frame to it can find out.
            often = peer.hellos < _HELLOS_TO_A_HUNG_PEER
            wait_s = self.settings.silence_s if often else _LONG_HUNG_S
            if now - peer.sent_at >= wait_s:
                peer.hellos, peer.sent_at = peer.hellos + 1, now
                self._greet(id)
                self.targets.stop_again(id, now)
        elif now - peer.heard_at >= self.settings.silence_s:
            peer.hung, peer.sent_at = True, now
            peer.breaker.failed(now)
            self._give_up(id, "the peer hangs", now)
        elif now - peer.sent_at >= self.settings.heartbeat_s:
            peer.sent_at = now
            self.outbox.send(id, Frame(Kind.BEAT))
            self.targets.stop_again(id, now)

    def _give_up(self, id: PeerId, reason: str, now: float) -> None:
        self.outbox.counts["peers_hung"] += 1
        self.targets.lost(id, reason, now, cut=False)
        # What is in flight to a hung peer may never end, or when it wakes.
        self.sources.lost(id, reason, now)

    def _with(self, peer: PeerId) -> bool:
        """Say whether anything is open with *peer*."""
        return peer in self._busy()

    def _busy(self) -> set[PeerId]:
        """The peers that something is open with."""
        fetched = {inc.fetch.peer for inc in self.targets.fetches.values()}
        return (self.sources.asked_by() | fetched) & self.peers.keys()

    def _greet(self, peer: PeerId) -> None:
        self.outbox.send(peer, Frame(Kind.HELLO, text=self.address))

    def _check(self, blocks: tuple[int, ...]) -> None:
        if blocks and not 0 <= min(blocks) <= max(blocks) < self.blocks:
            raise TransferError(
                f"blocks {min(blocks)}..{max(blocks)} of a slab of {self.blocks}"
            )
