"""Carries out what an `Endpoint` wants, with a NIXL agent; for one thread only.

Blocks go by a WRITE of NIXL, or by a copy where the peer's slab can be mapped; what
is said goes with a WRITE, by a notification, or by `Mail` to such a peer.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from ...errors import TransferError
from ...transport.endpoint import Endpoint
from ...transport.frames import Frame, Kind
from ...transport.handshake import Address
from ...transport.interface import PeerId
from ...transport.outbox import Blocks, Drop, Effect, Listen, Meet, Send, Write
from .blocks import Xxh3, packed, some
from .copiers import Copiers
from .mail import RINGFUL, Inbox, Mail
from .shared import Mapped
from .slab import Slab, descriptors

_log = logging.getLogger(__name__)
_LOCAL = "NIXL_INIT_AGENT"
_LOOKS_AT_A_WRITE = 4
_MESSAGES = 64
"""Of one peer, at one look."""
_BY_NIXL = Kind.HELLO, Kind.BEAT, Kind.BYE, Kind.MAIL
"""Which finds out who is dead, and greets who does not listen yet."""
_COPIED = object()
"""In place of NIXL's handle of a write: the blocks are there already."""


@attrs.define(eq=False)
class _Reached:
    """A peer that the agent can write to."""

    address: Address
    mapped: Mapped | None
    """Its slab, if this process could map it."""
    blocks: Any
    """Prepared descriptors of every block there otherwise, by layer and block."""
    mail: Mail | None
    """What is said to it, where its slab is mapped."""


@attrs.define(eq=False)
class Carrier:
    """A NIXL agent with one slab.

    NIXL's errors share no type, so every call that reaches a peer catches all
    of them and takes the peer for dead: what cannot be written to cannot be
    worked with, and a peer that lives will be met again.

    Attributes:
        endpoint: What to carry for.
        slab: What to register, once, in as few regions as it has.
        checksums: Of what is written go with it.
        written: Some write has ended well.
        copied: The last was a copy.
    """

    endpoint: Endpoint
    slab: Slab
    checksums: bool = True
    written: bool = attrs.field(default=False, init=False)
    copied: bool = attrs.field(default=False, init=False)
    _agent: Any = attrs.field(init=False)
    _local: Any = attrs.field(init=False)
    _registered: Any = attrs.field(init=False)
    _bases: array[int] = attrs.field(init=False)
    _copiers: Copiers = attrs.field(init=False)
    _known: dict[PeerId, Address] = attrs.field(factory=dict, init=False)
    _reached: dict[PeerId, _Reached] = attrs.field(factory=dict, init=False)
    _inbox: Inbox = attrs.field(factory=Inbox, init=False)
    _flying: dict[int, tuple[PeerId, Any]] = attrs.field(factory=dict, init=False)
    _kept: list[Any] = attrs.field(factory=list, init=False)
    """Handles that ended badly; data may land after a release, so none is."""

    def __attrs_post_init__(self) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        slab, endpoint = self.slab, self.endpoint
        if slab.enter is not None:
            slab.enter()
        self._bases = packed(slab.bases)
        self._copiers = Copiers(endpoint.settings.copiers)
        config = nixl_agent_config(enable_prog_thread=False)
        self._agent = nixl_agent(endpoint.id, config)
        self._registered = self._agent.register_memory(slab.regions(), slab.memory)
        self._local = self._prepare(_LOCAL, slab.bases, slab.blocks, slab.device)
        endpoint.address = Address(
            id=endpoint.id,
            layout=slab.layout,
            blocks=slab.blocks,
            bases=slab.bases,
            memory=slab.memory,
            device=slab.device,
            metadata=self._agent.get_agent_metadata(),
            shared="" if slab.shared is None else slab.shared.where(),
        ).sign(endpoint.key)

    def reach(self, address: Address, now: float) -> bool:
        """Make a peer writable; return whether it is."""
        if address.id in self._reached:
            return True
        try:
            mapped = Mapped.of(address) if self.slab.memory == "DRAM" else None
            self._agent.add_remote_agent(address.metadata)
            blocks = None if mapped is not None else self._listed(address)
            mail = None if mapped is None else Mail.new()
        except Exception as error:
            self.endpoint.died(address.id, f"NIXL refuses the peer: {error}", now)
            return False
        self._known[address.id] = address
        self._reached[address.id] = _Reached(address, mapped, blocks, mail)
        return True

    def step(self, now: float) -> bool:
        """Take in what arrived and what ended; return whether anything did."""
        moved = self._take_mail(now)
        notified = self._agent.get_new_notifs()
        if notified:
            self._take_mail(now, RINGFUL)  # what was said before is heard before
        for sender, messages in notified.items():
            for message in messages:
                self.endpoint.heard(sender, message, now)
                self._answer()
            moved = True
        for token in list(self._flying):
            moved |= self._check(token, now)
        return moved

    def words(self) -> list[int]:
        """Return where mail would show, see `Mail.word`, one after the other.

        There are none where something may come that only a `step` finds.
        """
        if self._flying or len(self._inbox) != len(self._reached):
            return []
        return self._inbox.words()

    def _take_mail(self, now: float, most: int = _MESSAGES) -> bool:
        """Take in what peers have put into their rings; return whether any did."""
        moved, counts = False, self.endpoint.outbox.counts
        for peer, frame in self._inbox.frames(most, counts):
            self.endpoint.take(peer, frame, now)
            self._answer()
            moved = True
        return moved

    def _answer(self) -> None:
        """Tell the user what came of a frame, and then its sender."""
        if self.endpoint.outbox.reports:
            self.endpoint.outbox.tell()
        self.carry()

    def carry(self) -> None:
        """Carry out all effects, and what can be written now."""
        effects = self.endpoint.outbox.effects
        while self.endpoint.pump() or effects:
            while effects:
                self._do(effects.popleft())

    def close(self) -> None:
        """Let go of everything; what is in flight to a hung peer is left to it."""
        for peer in list(self._reached):
            self._drop(peer)
        self._copiers.close()
        self._local = None
        self._agent.deregister_memory(self._registered)

    def _do(self, effect: Effect) -> None:
        match effect:
            case Write():
                self._write(effect)
            case Send():
                self._say(effect.peer, effect.frame)
            case Meet(peer=peer, address=signed):
                self._meet(peer, signed)
            case Listen(peer=peer, place=place):
                self._listen(peer, place)
            case Drop(peer=peer):
                self._drop(peer)

    def _say(self, peer: PeerId, frame: Frame) -> None:
        """Send a frame, through memory if that can be."""
        if not self._met(peer):
            return
        mail = self._reached[peer].mail
        if mail is not None and frame.kind not in _BY_NIXL and mail.put(frame.pack()):
            return
        sealed = frame.seal(self.endpoint.key, self.endpoint.id, peer)
        sent = self._by_nixl(peer, self._agent.send_notif, peer, sealed)
        if sent and frame.kind is Kind.HELLO:
            self._tell_where(peer)

    def _tell_where(self, peer: PeerId) -> None:
        """Tell a peer where what is said to it can be read, if anywhere."""
        reached = self._reached.get(peer)
        if reached is not None and reached.mail is not None:
            self._say(peer, Frame(Kind.MAIL, text=reached.mail.where.encode()))

    def _listen(self, peer: PeerId, place: str) -> None:
        new = self.slab.memory == "DRAM" and self._inbox.listen(peer, place)
        if new:  # who has a new place has forgotten ours
            self._tell_where(peer)

    def _meet(self, peer: PeerId, signed: bytes) -> None:
        now, mine = time.monotonic(), self.endpoint
        try:
            address = Address.verify(signed, mine.key, mine.layout)
        except TransferError as error:
            _log.warning("a peer was refused: %s", error)
            mine.died(peer, str(error), now)
            return
        if self.reach(address, now):
            self._tell_where(peer)

    def _met(self, peer: PeerId) -> bool:
        """Say whether *peer* can be reached, again if need be."""
        if peer in self._reached:
            return True
        address = self._known.get(peer)
        if address is None or peer not in self.endpoint.peers:
            return False
        return self.reach(address, time.monotonic())

    def _by_nixl(self, peer: PeerId, act: Callable[..., object], *what: Any) -> bool:
        """Have NIXL do something with *peer*; return whether it could.

        Nothing else may be done here: what raises takes the peer for dead, and
        what a dead one was to write to for free.
        """
        try:
            act(*what)
        except Exception as error:
            self._lose(peer, error, time.monotonic())
            return False
        return True

    def _lose(self, peer: PeerId, error: Exception, now: float) -> None:
        """Take in that NIXL cannot reach *peer* any more."""
        self.endpoint.died(peer, f"the peer is gone: {type(error).__name__}", now)
        self._drop(peer)

    def _write(self, write: Write) -> None:
        peer, token = write.peer, write.token
        if not self._met(peer):
            self.endpoint.wrote(token, "the peer died", time.monotonic())
            return
        mapped = self._reached[peer].mapped
        try:
            frame = self._summed(write) if mapped is None else self._copy(write, mapped)
        except Exception as error:  # of blocks that the peer has named, or of sums
            self.endpoint.wrote(token, f"cannot write: {error}", time.monotonic())
            return
        if mapped is not None:
            self._flying[token] = (peer, _COPIED)
            self._say(peer, frame)
            return
        sealed = frame.seal(self.endpoint.key, self.endpoint.id, peer)
        if not self._by_nixl(peer, self._post, write, sealed):
            self.endpoint.wrote(token, "the peer died", time.monotonic())

    def _post(self, write: Write, sealed: bytes) -> None:
        """Have NIXL write blocks, and notify the peer when they are there."""
        reached = self._reached[write.peer]
        blocks, theirs = self.slab.blocks, reached.address.blocks
        # NIXL merges neighbours itself where they are neighbours on both sides.
        handle = self._agent.make_prepped_xfer(
            "WRITE",
            self._local,
            across(write.layer, write.layers, write.source, blocks),
            reached.blocks,
            across(write.layer, write.layers, write.target, theirs),
            sealed,
        )
        self._flying[write.token] = (write.peer, handle)
        self._agent.transfer(handle)
        # What UCX copies at once, it notifies the peer of when it is looked at again.
        for _ in range(_LOOKS_AT_A_WRITE):
            if self._check(write.token, time.monotonic()):
                break

    def _summed(self, write: Write) -> Frame:
        """Return what to say of a write."""
        if not self.checksums:
            return write.frame
        last = write.layer + write.layers
        return write.frame.with_values(self._sums(write.layer, last, write.source))

    def _copy(self, write: Write, mapped: Mapped) -> Frame:
        """Copy blocks, and return what to say of it."""
        first, last, slab = write.layer, write.layer + write.layers, self.slab
        known = slab.gathered or slab.sums
        summed = self.checksums and isinstance(known, Xxh3)
        here, blocks = some(self._bases, first, last), (write.source, write.target)
        sums = self._copiers.copy(mapped, here, first, *blocks, summed=summed)
        return self._summed(write) if sums is None else write.frame.with_values(sums)

    def _sums(self, first: int, last: int, blocks: Blocks) -> bytes:
        known = self.slab.gathered or self.slab.sums
        assert known is not None, "a transport with checksums has some"
        return bytes(known(first, last, blocks))

    def _check(self, token: int, now: float) -> bool:
        """Report a write if it has ended."""
        peer, handle = self._flying.get(token, ("", None))
        if handle is None:  # its peer died while others were looked at
            return False
        try:
            if handle is not _COPIED and self._agent.check_xfer_state(handle) == "PROC":
                return False
        except Exception as error:
            self._lose(peer, error, now)
            return True
        del self._flying[token]
        if handle is not _COPIED:
            self._agent.release_xfer_handle(handle)
        self.written, self.copied = True, handle is _COPIED
        self.endpoint.wrote(token, None, now)
        return True

    def _drop(self, peer: PeerId) -> None:
        """Forget a peer that is gone, and with it what is in flight to it."""
        self._known.pop(peer, None)
        self._inbox.forget(peer)
        if self._reached.pop(peer, None) is not None:
            try:
                self._agent.remove_remote_agent(peer)
            except Exception as error:
                _log.info("NIXL will not forget %s: %s", peer, error)
        for token in [t for t, (to, _) in self._flying.items() if to == peer]:
            handle = self._flying.pop(token)[1]
            if handle is not _COPIED:
                self._kept.append(handle)
            self.endpoint.wrote(token, "the peer is gone", time.monotonic())

    def _listed(self, address: Address) -> Any:
        return self._prepare(
            address.id,
            address.bases,
            address.blocks,
            address.device,
            address.memory,
        )

    def _prepare(
        self,
        agent: str,
        bases: tuple[int, ...],
        blocks: int,
        device: int,
        memory: str = "",
    ) -> Any:
        rows = descriptors(bases, blocks, self.slab.layout.block_bytes, device)
        listed = self._agent.get_xfer_descs(rows, memory or self.slab.memory)
        return self._agent.prep_xfer_dlist(agent, listed)


def across(
    first: int, layers: int, blocks: Blocks, blocks_a_layer: int
) -> NDArray[np.int32]:
    """Return where *blocks* of each of some layers are in a list of all blocks.

    >>> across(2, 2, np.array([0, 5]), 10).tolist()
    [20, 25, 30, 35]
    """
    blocks = np.asarray(blocks, np.int32)
    if layers == 1:
        return blocks + first * blocks_a_layer
    starts = np.arange(first, first + layers, dtype=np.int32) * blocks_a_layer
    return (starts[:, None] + blocks).ravel()
