"""What the fields of one KV event mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...types import Tier

_TIERS = {"GPU": Tier.GPU, "CPU": Tier.CPU, "STORAGE": Tier.DISK, "DISK": Tier.DISK}


def extras_of(
    keys: Sequence[Any], lora: str | None, first: bool
) -> tuple[str, list[tuple[int, int, str]]] | None:
    """Return the salt among *keys*, and the media that begin in these blocks.

    Each block has its adapter's name, the first block of a prompt its salt, and
    any block the media that reach into it: a key, and where they begin from the
    block's first token on, below 0 if in an earlier block.

    Returns:
        The salt, and (block, offset, key) of each; None if a block has more, an
        embedding say, which has no name that a request could tell.
    """
    salt = ""
    media = []
    for place, block in enumerate(keys):
        rest = list(block or ())
        if lora is not None and rest and rest[0] == lora:
            rest.pop(0)
        if first and not place and rest and isinstance(rest[-1], str):
            salt = rest.pop()
        for item in rest:
            if not isinstance(item, (list, tuple)):
                return None
            key, offset = item
            if not (isinstance(key, str) and isinstance(offset, int)):
                return None
            if offset >= 0:
                media.append((place, offset, key))
    return salt, media


def tier_of(medium: Any, locality: Any) -> Tier:
    """Return where a block lives, by what its event says."""
    if medium is None or medium == "GPU":
        return Tier.GPU
    if locality == "REMOTE":
        return Tier.REMOTE
    return _TIERS.get(medium, Tier.REMOTE)
