"""What transports say to each other: one frame format, sealed.

    kind, version, attempt, layer, layers, start, blocks, generation, lengths |
    request | text | values | seal

Little endian.  `values` are unsigned numbers of 8 bytes whose meaning depends on
the kind.  The seal is half of an HMAC with SHA-256 (RFC 2104) over the ids of
sender and receiver, both of which are new with every start, and the frame: so it
can be neither forged without the key nor replayed into another connection.
Processors hash SHA-256 themselves, and some frames carry thousands of values.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import hmac
import struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import TransferError
from ..native import loops
from .interface import PeerId, TransferId

VERSION = 4
_HEAD = struct.Struct("<BBHHHIIQHII")
_SEAL_BYTES = 16
_BLOCK_BYTES = 64
"""Of SHA-256."""
_NONE = TransferId("", 0)

Words = NDArray[np.uint64]


class Kind(enum.IntEnum):
    """What a frame says, and what its fields then mean."""

    HELLO = 1
    """Text is the sender's address."""
    ASK = 2
    """Write to blocks *values*, from offered block *start* on; none if all are there
    already.  *layer* is 1 if the offer may come later, *attempt* is unused; text is
    the time left in ms."""
    DATA = 3
    """*blocks* blocks from *start* of each of *layers* layers from *layer* are
    written; values are their checksums, layer by layer."""
    ACK = 4
    """All of those blocks are right."""
    NACK = 5
    """All but the ones at *values*, counted layer by layer, are right."""
    ABORT = 6
    """Stop writing, and say FAIL when no write is in flight."""
    FAIL = 7
    """No write of this transfer is or will be in flight; text says why."""
    BEAT = 8
    """The sender is alive."""
    BYE = 9
    """The sender closes; no write of it is or will be in flight."""
    MAIL = 10
    """Text is where the sender puts frames as well, in words of its carrier."""


_KINDS = (None, *Kind)
"""By number."""


class Frame(NamedTuple):
    """One message.

    >>> frame = Frame(Kind.ACK, TransferId("r", 7), layer=2, start=4)
    >>> sent = frame.seal(b"k" * 32, "a", "b")
    >>> Frame.unseal(sent, b"k" * 32, "a", "b").id
    TransferId(request='r', generation=7)
    """

    kind: Kind
    id: TransferId = _NONE
    layer: int = 0
    attempt: int = 0
    start: int = 0
    values: bytes = b""
    text: bytes = b""
    layers: int = 1
    blocks: int = 0

    @property
    def numbers(self) -> Words:
        """The values, shape (n,)."""
        return np.frombuffer(self.values, np.uint64)

    def with_values(self, values: bytes) -> Frame:
        """Return the same with other values; `_replace` takes longer."""
        kind, id, layer, attempt, start, _, text, layers, blocks = self
        return Frame(kind, id, layer, attempt, start, values, text, layers, blocks)

    def seal(self, key: bytes, sender: PeerId, receiver: PeerId) -> bytes:
        """Return the bytes to send where others could write too."""
        body = self.pack()
        return body + _seal(body, key, sender, receiver)

    def pack(self) -> bytes:
        """Return the bytes to send where nobody else can write.

        Raises:
            OverflowError: A number or a text does not fit.
        """
        if loops is None:
            return pack_in_python(self)
        packed: bytes = loops.frame_pack(self, VERSION)
        return packed

    @classmethod
    def unseal(cls, data: bytes, key: bytes, sender: PeerId, receiver: PeerId) -> Frame:
        """Return the frame in *data*.

        Raises:
            TransferError: It is damaged or forged, or of another version.
        """
        body, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
        if not hmac.compare_digest(seal, _seal(body, key, sender, receiver)):
            raise TransferError("a frame is not sealed with the shared key")
        return cls.unpack(body)

    @classmethod
    def unpack(cls, body: bytes) -> Frame:
        """Return the frame that was packed.

        Raises:
            TransferError: It is of another version.
            ValueError: It is none.
        """
        if loops is None:
            frame = unpack_in_python(body)
        else:
            frame = loops.frame_unpack(body, VERSION, _KINDS, cls, TransferId)
        if frame is None:
            raise TransferError(f"a frame of another version than {VERSION}")
        return frame


def pack_in_python(frame: Frame) -> bytes:
    """Return what `Frame.pack` does, without compiled loops."""
    request = frame.id.request.encode()
    try:
        head = _HEAD.pack(
            frame.kind,
            VERSION,
            frame.attempt,
            frame.layer,
            frame.layers,
            frame.start,
            frame.blocks,
            frame.id.generation,
            len(request),
            len(frame.text),
            len(frame.values) // 8,
        )
    except struct.error as error:
        raise OverflowError(str(error)) from error
    return b"".join((head, request, frame.text, frame.values))


def unpack_in_python(body: bytes) -> Frame | None:
    """Return the frame that was packed; None if its version or kind is not known.

    Raises:
        ValueError: It is none.
    """
    if len(body) < _HEAD.size:
        raise ValueError(f"{len(body)} bytes are no frame")
    head = _HEAD.unpack_from(body)
    number, version, attempt, layer, layers, start, blocks, generation = head[:8]
    kind = _KINDS[number] if number < len(_KINDS) else None
    if version != VERSION or kind is None:
        return None
    text_at = _HEAD.size + head[8]
    values_at = text_at + head[9]
    if len(body) != values_at + 8 * head[10]:
        raise ValueError(f"{len(body)} bytes of another frame")
    id = TransferId(body[_HEAD.size : text_at].decode(), generation)
    text, values = body[text_at:values_at], body[values_at:]
    return Frame(kind, id, layer, attempt, start, values, text, layers, blocks)


def about(kind: Kind, id: TransferId, text: str = "") -> Frame:
    """Return a frame that says no more than which transfer, and why."""
    return Frame(kind, id, text=text.encode(errors="replace")[:2000])


def _seal(body: bytes, key: bytes, sender: PeerId, receiver: PeerId) -> bytes:
    inner, outer = _begun(key, sender, receiver)
    inner, outer = inner.copy(), outer.copy()
    inner.update(body)
    outer.update(inner.digest())
    seal: bytes = outer.digest()[:_SEAL_BYTES]
    return seal


@functools.lru_cache(1024)
def _begun(key: bytes, sender: PeerId, receiver: PeerId) -> tuple[Any, Any]:
    """Return both hashes of HMAC as they are before the frame.

    They are copied in half the time that `hmac.HMAC` takes.
    """
    if len(key) > _BLOCK_BYTES:
        key = hashlib.sha256(key).digest()
    key = key.ljust(_BLOCK_BYTES, b"\0")
    inner = hashlib.sha256(bytes([byte ^ 0x36 for byte in key]))
    inner.update(f"{len(sender)}:{sender}{receiver}".encode())
    return inner, hashlib.sha256(bytes([byte ^ 0x5C for byte in key]))
