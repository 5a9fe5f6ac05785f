"""Addresses: who a transport is and what its slab looks like, signed."""

from __future__ import annotations

import hashlib
import hmac
import json

import attrs

from ..errors import HandshakeRefused, TransferError, shown
from .frames import VERSION
from .interface import Layout, PeerId

_SIGNATURE_BYTES = 32

_MALFORMED = (AttributeError, KeyError, TransferError, TypeError, ValueError)


@attrs.frozen(kw_only=True)
class Address:
    """How to reach a transport.

    Attributes:
        id: Of the transport.
        layout: Of its slab.
        blocks: Blocks its slab holds in each layer.
        bases: Memory address at which each layer begins; empty in one process.
        memory: Kind of memory, as the carrier names it.
        device: Which device it is on.
        metadata: Opaque words of the carrier.
        shared: How peers on the same host can map the slab, in words of the
            carrier; empty if they cannot.

    >>> layout = Layout(model="m", dtype="bf16", layers=2, block_tokens=16,
    ...                 block_bytes=1024)
    >>> sent = Address(id="a", layout=layout, blocks=4).sign(b"k" * 32)
    >>> Address.verify(sent, b"k" * 32, layout).blocks
    4
    """

    id: PeerId
    layout: Layout
    blocks: int
    bases: tuple[int, ...] = ()
    memory: str = "DRAM"
    device: int = 0
    metadata: bytes = b""
    shared: str = ""

    def sign(self, key: bytes) -> bytes:
        """Return the address as peers may have it."""
        fields = attrs.asdict(self)
        fields["metadata"] = self.metadata.hex()
        fields["protocol"] = VERSION
        body = json.dumps(fields, separators=(",", ":")).encode()
        return hmac.digest(key, body, hashlib.sha256) + body

    @classmethod
    def verify(cls, signed: bytes, key: bytes, ours: Layout) -> Address:
        """Return the address in *signed* if its slab can work with *ours*.

        Raises:
            HandshakeRefused: Signed with another key, of another protocol, or
                its layout differs; the field is named.
        """
        if not isinstance(signed, bytes):
            raise HandshakeRefused("key", f"an address is bytes, not {shown(signed)}")
        signature, body = signed[:_SIGNATURE_BYTES], signed[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, hmac.digest(key, body, hashlib.sha256)):
            raise HandshakeRefused("key", "the address is not signed with our key")
        try:
            fields = json.loads(body)
            protocol = fields.pop("protocol")
            if protocol != VERSION:
                raise HandshakeRefused("protocol", f"{VERSION} here, {protocol} there")
            fields["layout"] = Layout(**fields["layout"])
            fields["bases"] = tuple(fields["bases"])
            fields["metadata"] = bytes.fromhex(fields["metadata"])
            address = cls(**fields)
        except HandshakeRefused:
            raise
        except _MALFORMED as error:
            raise HandshakeRefused("address", f"it is none: {error!r}") from error
        mismatch = ours.mismatch(address.layout)
        if mismatch is not None:
            raise HandshakeRefused(*mismatch)
        return address
