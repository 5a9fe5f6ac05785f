"""What an endpoint wants done, and what it has to tell."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any, TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from ..amounts import a_number
from ..errors import TransferError
from .frames import Frame, Words
from .interface import BlocksFreed, PeerId, Report, Side, TransferEnded, TransferId

Blocks: TypeAlias = NDArray[np.int32]
Sums: TypeAlias = Callable[[int, int, Blocks], "Words | bytes"]
"""Checksums of *blocks* in each layer from the first to before the second,
layer by layer, 8 bytes each, layers * n of them."""


@attrs.define(eq=False)
class Send:
    """Send *frame* to *peer*."""

    peer: PeerId
    frame: Frame


@attrs.define(eq=False)
class Write:
    """Copy blocks of some layers to *peer*, then deliver *frame* there.

    Its values are their checksums, which a driver may have to add.

    The blocks are the same in each of *layers* layers from *layer*.

    Report the end of it to `Endpoint.wrote` under *token*, success or not, and
    not before the last byte has moved, however long that takes: the peer's
    blocks are free from then on.
    """

    token: int
    peer: PeerId
    layer: int
    layers: int
    source: Blocks
    target: Blocks
    frame: Frame


@attrs.frozen
class Meet:
    """Make *peer* at *address* reachable; if it cannot be, `Endpoint.died`."""

    peer: PeerId
    address: bytes


@attrs.frozen
class Drop:
    """Forget *peer*, which has closed."""

    peer: PeerId


@attrs.frozen
class Listen:
    """Look for frames of *peer* in *place* too, if that can be had from here."""

    peer: PeerId
    place: str


Effect: TypeAlias = Send | Write | Meet | Drop | Listen


def _whole(default: int, least: int, most: int = 1 << 40) -> Any:
    limits = a_number(least, most=most, whole=True, error=TransferError)
    return attrs.field(default=default, validator=limits)


def _seconds(default: float) -> Any:
    limits = a_number(above=True, error=TransferError)
    return attrs.field(default=default, validator=limits)


@attrs.frozen(kw_only=True)
class Settings:
    """How transfers are cut, watched and retried.

    Attributes:
        piece_bytes: Most bytes of one write, which takes in as many layers as
            are ready.  Small enough that checking one piece overlaps with
            writing the next; on a CPU it also stays in the cache then.
        writes_in_flight: At once, to all peers.
        copiers: Threads that copy a write, where the peer's memory is mapped.
        max_attempts: Writes of one block before the transfer fails.
        heartbeat_s: Between signs of life while transfers are open.
        silence_s: Without a sign of life after which a peer counts as hung.
        idle_s: Between looks at peers that nothing is open with: whether they
            are still there, so that what is held for the dead is let go.
        early_asks: Early requests held for offers still to come, at most.

    Raises:
        TransferError: One makes no sense, or a peer would hang between heartbeats.
    """

    piece_bytes: int = _whole(1 << 22, 1)
    writes_in_flight: int = _whole(4, 1)
    copiers: int = _whole(1, 1, 64)
    # An attempt is told in a byte, of which 255 says that there are no more.
    max_attempts: int = _whole(3, 1, 200)
    heartbeat_s: float = _seconds(0.2)
    silence_s: float = _seconds(2.0)
    idle_s: float = _seconds(5.0)
    early_asks: int = _whole(4096, 0)

    def __attrs_post_init__(self) -> None:
        if self.silence_s <= self.heartbeat_s:
            raise TransferError(
                f"silence_s is {self.silence_s}, must be above heartbeat_s,"
                f" {self.heartbeat_s}"
            )


@attrs.define(eq=False)
class Outbox:
    """Effects for the driver and reports for the user, in order.

    Attributes:
        effects: Those to carry out.
        reports: Those to hand on.
        counts: Totals since the start.
        tell: Called when a report should be handed on without delay.
    """

    effects: deque[Effect] = attrs.field(factory=deque)
    reports: deque[Report] = attrs.field(factory=deque)
    counts: Counter[str] = attrs.field(factory=Counter)
    tell: Callable[[], object] = attrs.field(default=lambda: None)

    def send(self, peer: PeerId, frame: Frame) -> None:
        """Send a frame."""
        self.effects.append(Send(peer, frame))

    def ended(
        self,
        id: TransferId,
        side: Side,
        at: float,
        error: str | None,
        retransmitted_blocks: int = 0,
    ) -> None:
        """Report an outcome."""
        self.reports.append(TransferEnded(id, side, at, error, retransmitted_blocks))
        self.counts["failed" if error is not None else "done"] += 1

    def freed(self, id: TransferId, side: Side, at: float) -> None:
        """Report that blocks may be reused."""
        self.reports.append(BlocksFreed(id, side, at))
