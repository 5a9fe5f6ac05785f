"""What the two sides of the connector tell each other."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
)

from ...live.engine import Promise
from ...transport.interface import TransferId


@dataclass(frozen=True)
class Save:
    """Blocks of a prompt that a step computes.

    Attributes:
        id: Of the hand-off.
        start: Position in the prompt of the first of them.
        blocks: The engine's block ids.
        total: Blocks of the whole prompt.
        last: The prompt is complete with these.
    """

    id: TransferId
    start: int
    blocks: tuple[int, ...]
    total: int
    last: bool


@dataclass(frozen=True)
class Load:
    """Blocks that a request wants from a prefill engine.

    Attributes:
        request: By the engine's name for it.
        id: Of the hand-off.
        address: Of the prefill engine's transports, by rank.
        first: Leading blocks that are here already.
        blocks: The engine's block ids; none lets the offer go.
    """

    request: str
    id: TransferId
    address: Mapping[str, str]
    first: int
    blocks: tuple[int, ...]


@dataclass
class Plan(KVConnectorMetadata):  # type: ignore[misc]
    """What the workers shall do in a step.

    Attributes:
        saves: Gather these after the step.
        loads: Fetch these.
        drops: Give these hand-offs up.
        idle: Nothing is computed in the step.
    """

    saves: list[Save] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    drops: list[TransferId] = field(default_factory=list)
    idle: bool = False


@dataclass
class Addresses(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """Where a worker's transport is reached, from the worker to its scheduler."""

    address: str


def to_params(id: TransferId, addresses: Mapping[str, str]) -> dict[str, Any]:
    """Return the `kv_transfer_params` a decode engine needs, fit for JSON."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "llmd_request": id.request,
        # As text: JSON readers elsewhere round numbers beyond 53 bits.
        "llmd_generation": str(id.generation),
        "llmd_addresses": dict(addresses),
    }


def to_reserve(id: TransferId) -> dict[str, Any]:
    """Return the `kv_transfer_params` that let a prefill engine call a hand-off *id*.

    Who knows the name and the engine's addresses beforehand can send the decode
    engine off, with `to_params`, while the prompt is still computed.
    """
    return {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "llmd_request": id.request,
        "llmd_generation": str(id.generation),
    }


def reserved(params: Mapping[str, Any]) -> TransferId | None:
    """Return the name that *params* give a hand-off, if they do.

    >>> reserved(to_reserve(TransferId("r", 7)))
    TransferId(request='r', generation=7)
    """
    if "llmd_generation" not in params:
        return None
    return TransferId(params["llmd_request"], int(params["llmd_generation"]))


def promise(request: str, handed: Mapping[str, Any]) -> Promise | None:
    """Return a hand-off named anew, to who is reached where *handed* says.

    None if it says nothing, as before an engine's first hand-off.
    """
    addresses = handed.get("llmd_addresses")
    if addresses is None:
        return None
    id = TransferId.fresh(request)
    return Promise(prefill=to_reserve(id), decode=to_params(id, addresses))


def from_params(
    params: Mapping[str, Any] | None,
) -> tuple[TransferId, Mapping[str, str]] | None:
    """Return the hand-off that *params* describe, if they do."""
    if not params or not params.get("do_remote_prefill"):
        return None
    if "llmd_request" not in params:
        return None
    id = TransferId(params["llmd_request"], int(params["llmd_generation"]))
    return id, params["llmd_addresses"]


def to_text(address: bytes) -> str:
    """Return an address as text."""
    return base64.b64encode(address).decode()


def to_address(text: str) -> bytes:
    """Return an address that was made text."""
    return base64.b64decode(text)
