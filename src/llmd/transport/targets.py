"""The receiving side: fetches, and the check of what arrives."""

from __future__ import annotations

import attrs
import numpy as np

from ..errors import TransferError
from .frames import Frame, Kind, about
from .interface import Fetch, PeerId, Side, TransferId
from .outbox import Blocks, Outbox, Settings, Sums

_RIGHT = 255


@attrs.define(eq=False)
class Incoming:
    """One fetch, from `fetch` until its blocks are free.

    asked -> every block verified -> free
      |
      +-> failed -> quarantine -> the source said FAIL or BYE, or is dead -> free

    Attributes:
        fetch: It.
        layers: Layers of the slab.
        ends_at: When it is given up.
        error: Why it failed; its blocks are in quarantine.
        told_at: When the source was last asked to stop.
        damaged_blocks: Blocks that arrived damaged.
    """

    fetch: Fetch
    layers: int
    ends_at: float
    error: str | None = None
    told_at: float = -np.inf
    damaged_blocks: int = 0
    _blocks: Blocks = attrs.field(init=False)
    _due: list[bytearray] = attrs.field(init=False)
    """By layer: the attempt that is expected of each block, `_RIGHT` once it is."""
    _missing: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._blocks = np.array(self.fetch.blocks, dtype=np.int32)
        self._due = [bytearray(len(self._blocks)) for _ in range(self.layers)]
        self._missing = self.layers * len(self._blocks)

    def take(self, frame: Frame, sums: Sums | None) -> list[int] | None:
        """Check what DATA says has arrived.

        Returns:
            Which of its blocks are damaged, counted layer by layer; None if the
            frame is stale.
        """
        first, start, attempt = frame.layer, frame.start, frame.attempt
        last, stop = first + frame.layers, start + frame.blocks
        if last > self.layers or stop > len(self._blocks) or attempt >= _RIGHT:
            return None
        if last == first or stop == start:
            return None
        expected, due = bytes((attempt,)) * frame.blocks, self._due[first:last]
        for row in due:
            if row[start:stop] != expected:
                return None
        damaged = [] if sums is None else self._damaged(frame, sums)
        if damaged is None:
            return None
        right = bytes((_RIGHT,)) * frame.blocks
        for row in due:
            row[start:stop] = right
        for at in damaged:
            number, column = divmod(at, frame.blocks)
            due[number][start + column] = attempt + 1
        self.damaged_blocks += len(damaged)
        self._missing -= len(due) * frame.blocks - len(damaged)
        return damaged

    def _damaged(self, frame: Frame, sums: Sums) -> list[int] | None:
        """Return which blocks have other checksums here; None if not as many."""
        start, blocks = frame.start, self._blocks
        if frame.blocks < len(blocks):
            blocks = blocks[start : start + frame.blocks]
        found = bytes(sums(frame.layer, frame.layer + frame.layers, blocks))
        if found == frame.values:
            return []
        if len(found) != len(frame.values):
            return None
        here = np.frombuffer(found, np.uint64)
        others: list[int] = np.flatnonzero(here != frame.numbers).tolist()
        return others

    @property
    def complete(self) -> bool:
        """Every block of every layer is right."""
        return not self._missing


@attrs.define(eq=False)
class Targets:
    """All fetches of an endpoint."""

    layers: int
    sums: Sums | None
    settings: Settings
    outbox: Outbox
    fetches: dict[TransferId, Incoming] = attrs.field(factory=dict)
    taken: set[int] = attrs.field(factory=set)

    def fetch(self, fetch: Fetch, now: float) -> None:
        """Ask the source; from now on its blocks are taken.

        Raises:
            TransferError: A block is named twice, or is taken already.
        """
        blocks = set(fetch.blocks)
        if len(blocks) != len(fetch.blocks):
            raise TransferError("a block is named twice")
        if not self.taken.isdisjoint(blocks):
            held = sorted(self.taken & blocks)[:5]
            raise TransferError(f"blocks {held} belong to a transfer not over yet")
        self.taken |= blocks
        incoming = Incoming(fetch, self.layers, now + fetch.timeout_s)
        self.fetches[fetch.id] = incoming
        ask = Frame(
            Kind.ASK,
            fetch.id,
            layer=int(fetch.early),
            start=fetch.first,
            values=np.array(fetch.blocks, dtype=np.uint64).tobytes(),
            text=str(int(1e3 * fetch.timeout_s)).encode(),
        )
        self.outbox.send(fetch.peer, ask)
        if not blocks:
            self._ended(incoming, now)
            self._free(incoming, now)

    def data(self, peer: PeerId, frame: Frame, now: float) -> bool:
        """Check blocks that arrived; return whether that made a fetch whole."""
        incoming = self._of(peer, frame)
        damaged = None
        if incoming is not None and incoming.error is None:
            damaged = incoming.take(frame, self.sums)
        if incoming is None or damaged is None:
            self.outbox.counts["stale"] += 1
            return False
        if damaged:
            self.outbox.counts["damaged_blocks"] += len(damaged)
            if frame.attempt + 1 >= self.settings.max_attempts:
                times = self.settings.max_attempts
                self.fail(incoming, f"blocks arrived damaged {times} times", now)
                return False
            words = np.array(damaged, dtype=np.uint64).tobytes()
            nack = frame._replace(kind=Kind.NACK, values=words, text=b"")
            self.outbox.send(peer, nack)
            return False
        if incoming.complete:
            self._ended(incoming, now)
            self._free(incoming, now)
            self.outbox.tell()  # the user, who waits for it, before the source
        self._acknowledge(peer, frame)
        return incoming.complete

    def stopped(self, peer: PeerId, frame: Frame, now: float) -> bool:
        """Take in FAIL: nothing is in flight; return whether it was news."""
        incoming = self._of(peer, frame)
        if incoming is None:
            return False
        news = incoming.error is None
        if news:
            incoming.error = frame.text.decode(errors="replace") or "the source failed"
            self._ended(incoming, now)
        self._free(incoming, now)
        return news

    def fail(self, incoming: Incoming, reason: str, now: float) -> None:
        """Give a fetch up; its blocks stay in quarantine."""
        if incoming.error is None:
            incoming.error = reason
            self._ended(incoming, now)
            self._stop(incoming, now)

    def lost(self, peer: PeerId, reason: str, now: float, *, cut: bool) -> None:
        """Give up what *peer* was to send; *cut*: it can write no more."""
        for incoming in [
            inc for inc in self.fetches.values() if inc.fetch.peer == peer
        ]:
            if cut:
                if incoming.error is None:
                    incoming.error = reason
                    self._ended(incoming, now)
                self._free(incoming, now)
            else:
                self.fail(incoming, reason, now)

    def tick(self, now: float) -> list[PeerId]:
        """Give up what took too long; return the peers that were too slow."""
        slow = []
        for incoming in list(self.fetches.values()):
            if incoming.error is None and incoming.ends_at <= now:
                slow.append(incoming.fetch.peer)
                self.fail(incoming, "the deadline passed", now)
        return slow

    def stop_again(self, peer: PeerId, now: float) -> None:
        """Repeat ABORT to a peer that has not answered it."""
        for incoming in self.fetches.values():
            quiet = now - incoming.told_at >= self.settings.heartbeat_s
            if incoming.fetch.peer == peer and incoming.error is not None and quiet:
                self._stop(incoming, now)

    def _of(self, peer: PeerId, frame: Frame) -> Incoming | None:
        incoming = self.fetches.get(frame.id)
        if incoming is None or incoming.fetch.peer != peer:
            return None
        return incoming

    def _acknowledge(self, peer: PeerId, frame: Frame) -> None:
        ack = Frame(
            Kind.ACK,
            frame.id,
            frame.layer,
            frame.attempt,
            frame.start,
            layers=frame.layers,
            blocks=frame.blocks,
        )
        self.outbox.send(peer, ack)

    def _stop(self, incoming: Incoming, now: float) -> None:
        incoming.told_at = now
        fetch = incoming.fetch
        reason = f"the target gave up: {incoming.error}"
        self.outbox.send(fetch.peer, about(Kind.ABORT, fetch.id, reason))

    def _ended(self, incoming: Incoming, now: float) -> None:
        self.outbox.ended(
            incoming.fetch.id,
            Side.TARGET,
            now,
            incoming.error,
            incoming.damaged_blocks,
        )

    def _free(self, incoming: Incoming, now: float) -> None:
        del self.fetches[incoming.fetch.id]
        self.taken.difference_update(incoming.fetch.blocks)
        self.outbox.freed(incoming.fetch.id, Side.TARGET, now)
