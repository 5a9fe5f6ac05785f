"""Carries out what an `Endpoint` wants, with a NIXL agent; for one thread only.

Blocks go by a WRITE of NIXL, or by a copy where the peer's slab can be mapped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from ...errors import TransferError
from ...transport.endpoint import Endpoint
from ...transport.handshake import Address
from ...transport.interface import PeerId
from ...transport.outbox import Blocks, Drop, Effect, Meet, Send, Write
from .shared import Mapped
from .slab import Slab, descriptors

_log = logging.getLogger(__name__)
_LOCAL = "NIXL_INIT_AGENT"
_LOOKS_AT_A_WRITE = 4
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


@attrs.define(eq=False)
class Carrier:
    """A NIXL agent with one slab.

    NIXL's errors share no type, so every call that reaches a peer catches all
    of them and takes the peer for dead: what cannot be written to cannot be
    worked with, and a peer that lives will be met again.

    Attributes:
        endpoint: What to carry for.
        slab: What to register, once, in as few regions as it has.
        tell: Called when there are reports, before the peer is answered.
        written: Some write has ended well.
        copied: The last was a copy.
    """

    endpoint: Endpoint
    slab: Slab
    tell: Callable[[], object]
    written: bool = attrs.field(default=False, init=False)
    copied: bool = attrs.field(default=False, init=False)
    _agent: Any = attrs.field(init=False)
    _local: Any = attrs.field(init=False)
    _registered: Any = attrs.field(init=False)
    _known: dict[PeerId, Address] = attrs.field(factory=dict, init=False)
    _reached: dict[PeerId, _Reached] = attrs.field(factory=dict, init=False)
    _flying: dict[int, tuple[PeerId, Any]] = attrs.field(factory=dict, init=False)
    _kept: list[Any] = attrs.field(factory=list, init=False)
    """Handles that ended badly; data may land after a release, so none is."""

    def __attrs_post_init__(self) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        slab, endpoint = self.slab, self.endpoint
        if slab.enter is not None:
            slab.enter()
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
            self._agent.add_remote_agent(address.metadata)
            mapped = Mapped.of(address) if self.slab.memory == "DRAM" else None
            blocks = None if mapped is not None else self._listed(address)
        except Exception as error:
            self.endpoint.died(address.id, f"NIXL refuses the peer: {error}", now)
            return False
        self._known[address.id] = address
        self._reached[address.id] = _Reached(address, mapped, blocks)
        return True

    def step(self, now: float) -> bool:
        """Take in what arrived and what ended; return whether anything did."""
        moved = False
        for sender, messages in self._agent.get_new_notifs().items():
            for message in messages:
                self.endpoint.heard(sender, message, now)
                if self.endpoint.outbox.reports:
                    self.tell()
                self.carry()
            moved = True
        for token in list(self._flying):
            moved |= self._check(token, now)
        return moved

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
        self._local = None
        self._agent.deregister_memory(self._registered)

    def _do(self, effect: Effect) -> None:
        match effect:
            case Send(peer=peer, frame=frame):
                data = frame.seal(self.endpoint.key, self.endpoint.id, peer)
                self._to(peer, lambda: self._agent.send_notif(peer, data))
            case Write(peer=peer, token=token):
                if not self._to(peer, lambda: self._write(effect)):
                    self.endpoint.wrote(token, "the peer died", time.monotonic())
            case Meet(peer=peer, address=signed):
                self._meet(peer, signed)
            case Drop(peer=peer):
                self._drop(peer)

    def _meet(self, peer: PeerId, signed: bytes) -> None:
        now, mine = time.monotonic(), self.endpoint
        try:
            address = Address.verify(signed, mine.key, mine.layout)
        except TransferError as error:
            _log.warning("a peer was refused: %s", error)
            mine.died(peer, str(error), now)
            return
        self.reach(address, now)

    def _to(self, peer: PeerId, act: Callable[[], object]) -> bool:
        """Do something that needs *peer*; return whether it could be done."""
        now = time.monotonic()
        if peer not in self._reached:
            address = self._known.get(peer)
            met = peer in self.endpoint.peers
            if address is None or not met or not self.reach(address, now):
                return False
        try:
            act()
        except Exception as error:
            self._lose(peer, error, now)
            return False
        return True

    def _lose(self, peer: PeerId, error: Exception, now: float) -> None:
        """Take in that NIXL cannot reach *peer* any more."""
        self.endpoint.died(peer, f"the peer is gone: {type(error).__name__}", now)
        self._drop(peer)

    def _write(self, write: Write) -> None:
        reached = self._reached[write.peer]
        sealed = write.frame.seal(self.endpoint.key, self.endpoint.id, write.peer)
        if reached.mapped is not None:
            try:
                self._copy(write, reached.mapped)
            except ValueError as error:  # of the blocks that the peer has named
                self.endpoint.wrote(write.token, str(error), time.monotonic())
                return
            self._agent.send_notif(write.peer, sealed)
            self._flying[write.token] = (write.peer, _COPIED)
            return
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

    def _copy(self, write: Write, mapped: Mapped) -> None:
        for layer in range(write.layer, write.layer + write.layers):
            mapped.copy(self.slab.bases[layer], layer, write.source, write.target)

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
