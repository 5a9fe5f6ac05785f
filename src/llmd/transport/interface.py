"""The `KVTransport` interface and the values it exchanges."""

from __future__ import annotations

import abc
import enum
import operator
import secrets
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import attrs

from ..amounts import a_number
from ..errors import TransferError, shown
from ..types import RequestId

PeerId: TypeAlias = str


class Side(enum.Enum):
    """Which end of a transfer a transport is."""

    SOURCE = "source"
    TARGET = "target"


class TransferId(NamedTuple):
    """Names one hand-off; no two ever share a name.

    Attributes:
        request: The request whose prompt is handed off.
        generation: Tells apart hand-offs of requests of one name, so that
            what is left of an older one cannot be mistaken.
    """

    request: RequestId
    generation: int

    @classmethod
    def fresh(cls, request: RequestId) -> TransferId:
        """Return a name never used before.

        >>> TransferId.fresh("r") != TransferId.fresh("r")
        True
        """
        return cls(request, secrets.randbits(63))


_MOST_LAYERS = _LONGEST_NAME = 0xFFFF
"""As frames have two bytes for either."""
_MOST_BYTES = 1 << 48
_MOST_BLOCKS, _MOST_GENERATIONS = 1 << 32, 1 << 64
LONGEST_S = 1e6
"""That a transfer may take: what is held for it is let go of some day."""


def as_id(id: Any) -> TransferId:
    """Return the name of a transfer as frames can tell it.

    Raises:
        TransferError: It is none.

    >>> as_id(("r", 7))
    TransferId(request='r', generation=7)
    """
    try:
        request, generation = id
        length, generation = len(request.encode()), operator.index(generation)
    except (AttributeError, TypeError, ValueError) as error:
        raise TransferError(f"{shown(id)} names no transfer: {error}") from error
    if length > _LONGEST_NAME:
        raise TransferError(f"a request's id has {length} bytes, {_LONGEST_NAME} fit")
    if not 0 <= generation < _MOST_GENERATIONS:
        raise TransferError(f"generation is {generation}, must be 0..2**64 - 1")
    return TransferId(request, generation)


def as_index(number: Any) -> int:
    """Return which block or layer.

    Raises:
        TransferError: It is no whole number, or one below 0 or too large.
    """
    try:
        index = operator.index(number)
    except TypeError as error:
        raise TransferError(f"{shown(number)} is no whole number") from error
    if not 0 <= index < _MOST_BLOCKS:
        raise TransferError(f"{index} is not in 0..2**32 - 1")
    return index


def _size(value: Any) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        size = 0
    if not 1 <= size <= _MOST_BYTES or isinstance(value, bool):
        raise TransferError(f"a size of {shown(value)}, must be 1..{_MOST_BYTES}")
    return size


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise TransferError(f"{shown(value)} is no text")
    return value


@attrs.frozen(kw_only=True)
class Layout:
    """What two transports must agree on before they exchange blocks.

    Attributes:
        model: Whose KV it is.
        dtype: Of the cached values.
        layers: Arrays of blocks in the slab; keys and values count apart if
            they lie apart.
        block_tokens: Tokens a block.
        block_bytes: Bytes of one block in one layer.
        order: How heads and tokens lie in a block, in words of the engine.

    Raises:
        TransferError: A size is no whole number from 1 on, or a name is no text.

    >>> ours = Layout(model="m", dtype="bf16", layers=2, block_tokens=16,
    ...               block_bytes=1024)
    >>> ours.mismatch(attrs.evolve(ours, dtype="fp8"))
    ('dtype', "'bf16' here, 'fp8' there")
    """

    model: str = attrs.field(converter=_word)
    dtype: str = attrs.field(converter=_word)
    layers: int = attrs.field(converter=_size)
    block_tokens: int = attrs.field(converter=_size)
    block_bytes: int = attrs.field(converter=_size)
    order: str = attrs.field(default="", converter=_word)

    def __attrs_post_init__(self) -> None:
        if self.layers > _MOST_LAYERS:
            raise TransferError(f"layers is {self.layers}, must be <= {_MOST_LAYERS}")

    def mismatch(self, other: Layout) -> tuple[str, str] | None:
        """Return the first field that differs and how, or None."""
        for field in attrs.fields(Layout):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if ours != theirs:
                return field.name, f"{ours!r} here, {theirs!r} there"
        return None


def _blocks(blocks: Iterable[int]) -> tuple[int, ...]:
    try:
        return tuple([operator.index(block) for block in blocks])
    except TypeError as error:
        raise TransferError(f"{shown(blocks)} are no blocks: {error}") from error


def _a_peer(instance: object, field: Any, value: Any) -> None:
    if not isinstance(value, str):
        raise TransferError(f"{shown(value)} is no peer's id")


_SECONDS = a_number(most=LONGEST_S, error=TransferError)


@attrs.frozen(kw_only=True)
class Offer:
    """Blocks that a peer may fetch.

    Attributes:
        id: Of the hand-off.
        blocks: Where the prompt's KV lies here, in order of its tokens.
        ready: Every layer is computed; otherwise `KVTransport.ready` tells.
        timeout_s: How long to keep it; after that a fetch is refused.

    Raises:
        TransferError: The id is none, a block no whole number, or the time not in
            0..1e6 s.
    """

    id: TransferId = attrs.field(converter=as_id)
    blocks: tuple[int, ...] = attrs.field(converter=_blocks)
    ready: bool = attrs.field(default=True, converter=bool)
    timeout_s: float = attrs.field(default=30.0, validator=_SECONDS)


@attrs.frozen(kw_only=True)
class Fetch:
    """Blocks wanted from a peer that offers them.

    Attributes:
        id: Of the hand-off.
        peer: Who offers it.
        blocks: Where to put them here.
        first: Leading blocks of the offer to skip, as they are here already.
        early: The offer may come later; otherwise an unknown one is refused.
        timeout_s: How long the whole may take.

    Raises:
        TransferError: As of `Offer`, or *first* or *peer* is none.
    """

    id: TransferId = attrs.field(converter=as_id)
    peer: PeerId = attrs.field(validator=_a_peer)
    blocks: tuple[int, ...] = attrs.field(converter=_blocks)
    first: int = attrs.field(default=0, converter=as_index)
    early: bool = attrs.field(default=False, converter=bool)
    timeout_s: float = attrs.field(default=10.0, validator=_SECONDS)


class TransferEnded(NamedTuple):
    """The outcome of a transfer is known.

    Attributes:
        id: Of the hand-off.
        side: Which end of it this transport was.
        at: When, on the transport's clock, seconds.
        error: Why it failed, in words; None if every block is there, verified.
        retransmitted_blocks: Blocks sent again as they arrived damaged.
    """

    id: TransferId
    side: Side
    at: float
    error: str | None = None
    retransmitted_blocks: int = 0


class BlocksFreed(NamedTuple):
    """No byte of a transfer can move any more: its blocks may be reused."""

    id: TransferId
    side: Side
    at: float


Report: TypeAlias = TransferEnded | BlocksFreed


class KVTransport(abc.ABC):
    """Hands KV blocks of one slab over to the slabs of its peers.

    The source offers, the target fetches, and the source then writes: bytes
    are pushed, never pulled.  No call blocks.  From `offer` or `fetch` on, each
    transfer gives exactly one `TransferEnded` and after it, perhaps much later,
    exactly one `BlocksFreed`.  In between its blocks are in quarantine: a write
    may still land in them, or be read from them, so nobody else may use them.

    Whatever fails, it fails with an error (of `llmd.errors`) and never with wrong
    bytes.
    """

    @property
    @abc.abstractmethod
    def id(self) -> PeerId:
        """This transport's name, never used before, not even by its last life."""

    @abc.abstractmethod
    def address(self) -> bytes:
        """Return what a peer needs to `connect` here, opaque and signed."""

    @abc.abstractmethod
    def connect(self, address: bytes) -> PeerId:
        """Make a peer reachable, both ways; repeats do no harm.

        Raises:
            HandshakeRefused: The address is forged, or the layouts differ.
        """

    @abc.abstractmethod
    def offer(self, offer: Offer) -> None:
        """Let the peer that knows its id fetch *offer*, once.

        Raises:
            TransferError: The id is taken, or a block is out of range.
        """

    @abc.abstractmethod
    def ready(self, id: TransferId, layer: int) -> None:
        """Note that *layer* of an offer is computed and may go.

        One that is not open, or has no such layer, is let be.

        Raises:
            TransferError: The id or the layer is none.
        """

    @abc.abstractmethod
    def fetch(self, fetch: Fetch) -> None:
        """Ask the peer for blocks.

        Raises:
            TransferError: The id is taken, the peer is not connected, or a
                block is out of range, named twice or in quarantine.
            CircuitOpen: The peer failed too often lately.
        """

    @abc.abstractmethod
    def cancel(self, id: TransferId, reason: str = "cancelled") -> None:
        """Give a transfer up; it ends with *reason* as its error.

        An id that is unknown here is refused to whoever asks for it early.

        Raises:
            TransferError: It is no id.
        """

    @abc.abstractmethod
    def poll(self) -> list[Report]:
        """Return what ended or was freed since the last poll, in order."""

    @property
    @abc.abstractmethod
    def counts(self) -> Mapping[str, int]:
        """Totals since the start, for metrics and leak checks.

        `offers`, `fetches`, `writes`, `quarantined_blocks` and `peers` are what is
        held now; the others only grow.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Give up all transfers, tell the peers, let go; idempotent.

        The slab must stay mapped until this returns.  Blocks whose `BlocksFreed` has
        not come by then belong to a peer that hangs: it may write them still when
        it wakes, so the slab must not be used for anything else.
        """

    def __enter__(self) -> KVTransport:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
