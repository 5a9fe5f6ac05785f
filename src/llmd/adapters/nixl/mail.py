"""What is said to a peer that maps our memory, through memory too.

A notification of NIXL takes longer than a small block does.  Peers on one host write
to a ring of messages instead (`llmd/native/rings.h`), one ring each way, which its
writer makes and tells the reader of in a sealed frame.  Frames in it bear no seal: no
other process has that memory, as none has the slab's.  What cannot be put there,
since it is full, or the reader has not begun to look, goes by NIXL as ever.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator

import attrs
import numpy as np
from numpy.typing import NDArray

from ...errors import TransferError
from ...native import loops
from ...transport.frames import Frame
from ...transport.interface import PeerId
from .shared import SharedMemory, opened

_log = logging.getLogger(__name__)
_RING_BYTES = 1 << 18
RINGFUL = _RING_BYTES // 8
"""Messages are never more."""
_PUT, _READER, _BEGIN = 64, 128, 192
"""As in rings.h."""


class MailError(TransferError):
    """What is in a ring makes no sense."""


@attrs.frozen(eq=False)
class Mail:
    """A ring of messages, as its writer or its reader sees it.

    Attributes:
        memory: All of it.
        where: How the other end finds it.
        owner: Of the memory, at the writer.
    """

    memory: NDArray[np.uint8] = attrs.field(repr=False)
    where: str
    owner: SharedMemory | None = None
    _at: int = attrs.field(init=False)
    _bytes: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_at", self.memory.ctypes.data)
        object.__setattr__(self, "_bytes", len(self.memory) - _BEGIN)

    @classmethod
    def new(cls) -> Mail | None:
        """Return a ring to write to; None where there is none to be had."""
        if loops is None:
            return None
        with contextlib.suppress(TransferError):
            shared = SharedMemory(_BEGIN + _RING_BYTES)
            return cls(shared.array, shared.where(), shared)
        return None

    @classmethod
    def read(cls, where: str) -> Mail | None:
        """Begin to read a ring; None if it cannot be mapped from here."""
        if loops is None:
            return None
        try:
            memory, _ = opened(where)
        except Exception as error:  # whatever a peer may say
            _log.info("a ring of messages cannot be read: %s", error)
            return None
        if len(memory) != _BEGIN + _RING_BYTES:
            return None
        memory[_READER] = 1
        return cls(memory, where)

    def close(self) -> None:
        """Look no more."""
        self.memory[_READER] = 0

    def put(self, message: bytes) -> bool:
        """Write *message* and say so, if it fits and somebody reads."""
        assert loops is not None
        put: bool = loops.ring_put(self._at, self._bytes, message)
        return put

    def take(self) -> bytes | None:
        """Return the oldest message that was not taken yet, if any.

        Raises:
            MailError: The other end has written nonsense.
        """
        assert loops is not None
        try:
            message: bytes | None = loops.ring_take(self._at, self._bytes)
        except ValueError as error:
            raise MailError(str(error)) from error
        return message

    @property
    def word(self) -> tuple[int, int]:
        """An address, and what is there while there is nothing to take."""
        return self._at + _PUT, int(self.memory[:8].view(np.uint64)[0])


@attrs.define(eq=False)
class Inbox:
    """The rings that peers write to for this process."""

    _rings: dict[PeerId, Mail] = attrs.field(factory=dict, init=False)
    _places: dict[PeerId, str] = attrs.field(factory=dict, init=False)
    """Where peers said that theirs is, whether or not it can be read."""

    def __len__(self) -> int:
        return len(self._rings)

    def listen(self, peer: PeerId, place: str) -> bool:
        """Look where *peer* says, if that can be; return whether it is news."""
        if self._places.get(peer) == place:
            return False
        self.forget(peer)
        self._places[peer] = place
        mail = Mail.read(place)
        if mail is not None:
            self._rings[peer] = mail
        return True

    def forget(self, peer: PeerId) -> None:
        """Look no more for what *peer* says."""
        self._leave(peer)
        self._places.pop(peer, None)

    def frames(self, most: int, counts: Counter[str]) -> Iterator[tuple[PeerId, Frame]]:
        """Take out frames, *most* of each peer; nonsense is counted as forged."""
        for peer, mail in list(self._rings.items()):
            for _ in range(most):
                try:
                    message = mail.take()
                    if message is None:
                        break
                    frame = Frame.unpack(message)
                except MailError as error:  # where the next one begins is lost
                    _log.warning("the ring of %s is left: %s", peer, error)
                    counts["forged"] += 1
                    self._leave(peer)
                    break
                except (ValueError, TransferError):
                    counts["forged"] += 1
                else:
                    yield peer, frame

    def words(self) -> list[int]:
        """Return `Mail.word` of all rings, one after the other."""
        return [part for mail in self._rings.values() for part in mail.word]

    def _leave(self, peer: PeerId) -> None:
        mail = self._rings.pop(peer, None)
        if mail is not None:
            mail.close()
