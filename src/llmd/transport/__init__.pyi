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
from .ways import Choice, Place, Way, choose_way

__all__ = [
    "Address",
    "BlocksFreed",
    "Choice",
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
    "Place",
    "Report",
    "Settings",
    "Side",
    "TransferEnded",
    "TransferId",
    "Way",
    "choose_way",
]
