"""Moving KV blocks between workers: the `KVTransport` interface and its protocol."""

from .breaker import CircuitBreaker
from .endpoint import Endpoint
from .frames import Frame, Kind
from .handshake import Address
from .interface import (
    BlocksFreed,
    Fetch,
    KVTransport,
    Layout,
    Offer,
    PeerId,
    Report,
    Side,
    TransferEnded,
    TransferId,
)
from .local import LocalLink, LocalTransport
from .outbox import Settings

__all__ = [
    "Address",
    "BlocksFreed",
    "CircuitBreaker",
    "Endpoint",
    "Fetch",
    "Frame",
    "KVTransport",
    "Kind",
    "Layout",
    "LocalLink",
    "LocalTransport",
    "Offer",
    "PeerId",
    "Report",
    "Settings",
    "Side",
    "TransferEnded",
    "TransferId",
]
