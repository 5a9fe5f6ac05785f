"""Scattered blocks of several layers: copied, checksummed, or both at once.

In C (`llmd/native/blocks.h`) where there are compiled loops, by the twins here
otherwise; without the interpreter's lock in C.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from ...native import loops
from ...transport.frames import Words
from ...transport.outbox import Blocks

SumsOfBlocks: TypeAlias = "Callable[[array[int], Blocks, int, int], bytes]"
CopyBlocks: TypeAlias = (
    "Callable[[array[int], Blocks, array[int], Blocks, int, int, bool], bytes | None]"
)
_LEAST_BYTES = 241
"""Of a block that is checksummed in C."""


def packed(bases: Iterable[int]) -> array[int]:
    """Return addresses of block 0 of each layer as the functions here want them."""
    return array("Q", bases)


def some(bases: array[int], first: int, last: int) -> array[int]:
    """Return the addresses of layers from *first* to before *last*."""
    # Small transfers are mostly of all layers there are, and every step counts.
    return bases if last - first == len(bases) else bases[first:last]


def sums_in_python(
    bases: array[int], blocks: Blocks, block_bytes: int, limit: int
) -> bytes:
    """Return the XXH3 of *blocks* of each layer, layer by layer, 8 bytes each.

    Args:
        bases: Address of block 0 of each layer.
        blocks: Which, int32, shape (n,).
        block_bytes: Of each.
        limit: Blocks that there are.

    Raises:
        ValueError: A block is not there.
    """
    _expect(blocks, limit)
    at = _places(bases, blocks, block_bytes)
    whole = ctypes.c_char * block_bytes
    return array("Q", [xxh3_64_intdigest(whole.from_address(i)) for i in at]).tobytes()


def copy_in_python(
    bases: array[int],
    blocks: Blocks,
    to_bases: array[int],
    to_blocks: Blocks,
    block_bytes: int,
    limit: int,
    summed: bool,
) -> bytes | None:
    """Copy *blocks* of each layer to other layers.

    Args:
        bases: As above.
        blocks: As above.
        to_bases: Addresses of block 0 there; the two do not overlap.
        to_blocks: Where each goes, shape (n,).
        block_bytes: Of each.
        limit: Blocks that there are there.
        summed: Whether to checksum what is copied.

    Returns:
        The checksums, if so.

    Raises:
        ValueError: A block is not there; nothing is copied.
    """
    _expect(to_blocks, limit)
    if len(blocks) != len(to_blocks) or len(bases) != len(to_bases):
        raise ValueError("want as many blocks here as there")
    sums = sums_in_python(bases, blocks, block_bytes, 1 << 31) if summed else None
    come, go = (
        _places(bases, blocks, block_bytes),
        _places(to_bases, to_blocks, block_bytes),
    )
    for source, target in zip(come, go, strict=True):
        ctypes.memmove(target, source, block_bytes)
    return sums


def sums_for(block_bytes: int) -> SumsOfBlocks:
    """Return `sums_in_python`, or what does the same faster."""
    if loops is None or block_bytes < _LEAST_BYTES:
        return sums_in_python
    in_c: SumsOfBlocks = loops.block_sums
    return in_c


def copy_for(block_bytes: int, *, summed: bool) -> CopyBlocks:
    """Return `copy_in_python`, or what does the same faster."""
    if loops is None or (summed and block_bytes < _LEAST_BYTES):
        return copy_in_python
    in_c: CopyBlocks = loops.copy_blocks
    return in_c


@attrs.frozen(eq=False)
class Xxh3:
    """Checksums blocks of a slab in host memory: the XXH3 of their bytes.

    Whoever copies such blocks may make them on the way.

    Attributes:
        bases: Address of block 0 of each layer.
        block_bytes: Of each block.
        limit: Blocks in each layer.
        owner: Of the memory, kept as long as this is.
    """

    bases: array[int]
    block_bytes: int
    limit: int
    owner: Any = attrs.field(default=None, repr=False)
    _sums: SumsOfBlocks = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_sums", sums_for(self.block_bytes))

    def __call__(self, first: int, last: int, blocks: Blocks) -> bytes:
        """Return those of *blocks*, shape (n,), of layers from *first* to *last*."""
        blocks = np.asarray(blocks, np.int32, order="C")
        bases = some(self.bases, first, last)
        return self._sums(bases, blocks, self.block_bytes, self.limit)


def xxh3(layers: NDArray[np.uint8], blocks: Blocks) -> Words:
    """Checksum *blocks* of each of *layers*, layer by layer.

    Args:
        layers: C-contiguous, shape (layers, blocks, block_bytes).
        blocks: Which, shape (n,).
    """
    count, limit, block_bytes = layers.shape
    first, stride = layers.ctypes.data, limit * block_bytes
    bases = packed(first + i * stride for i in range(count))
    found = Xxh3(bases, block_bytes, limit)(0, count, blocks)
    return np.frombuffer(found, np.uint64)


def _expect(blocks: Blocks, limit: int) -> None:
    if len(blocks) and not 0 <= blocks.min() <= blocks.max() < limit:
        raise ValueError(f"a block is not one of {limit}")


def _places(bases: array[int], blocks: Blocks, block_bytes: int) -> Iterator[int]:
    starts = [block * block_bytes for block in blocks.tolist()]
    return (base + start for base in bases for start in starts)
