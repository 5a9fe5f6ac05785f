"""What the fields of one KV event mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...types import Tier

_TIERS = {"GPU": Tier.GPU, "CPU": Tier.CPU, "STORAGE": Tier.DISK, "DISK": Tier.DISK}


def salt_of(keys: Sequence[Any], lora: str | None, first: bool) -> str | None:
    """Return the salt among *keys*, block by block; None if there is more.

    Each block has its adapter's name, the first block of a prompt its salt,
    and any block what else went into it: image, embedding.
    """
    salt = ""
    for block in keys:
        rest = list(block or ())
        if lora is not None and rest and rest[0] == lora:
            rest.pop(0)
        if first and len(rest) == 1 and isinstance(rest[0], str):
            salt = rest.pop()
        if rest:
            return None
        first = False
    return salt


def tier_of(medium: Any, locality: Any) -> Tier:
    """Return where a block lives, by what its event says."""
    if medium is None or medium == "GPU":
        return Tier.GPU
    if locality == "REMOTE":
        return Tier.REMOTE
    return _TIERS.get(medium, Tier.REMOTE)
