"""The memory that a transport moves blocks in and out of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from ...errors import TransferError, shown
from ...transport.interface import Layout
from ...transport.outbox import Sums
from .blocks import Xxh3, packed
from .shared import SharedMemory


@attrs.frozen(kw_only=True, eq=False)
class Slab:
    """Layers of blocks at fixed addresses.

    Attributes:
        layout: What is in it.
        blocks: In each layer.
        bases: Address of each layer, `layout.layers` of them.
        memory: "DRAM" or "VRAM".
        device: Which GPU, for VRAM.
        sums: Checksums of blocks of some layers; None if there is no way to read
            the memory from here.
        gathered: The same for blocks that are sent, where it was found when they
            were put there; None asks *sums* again.
        enter: Called once in the thread that carries blocks, before anything
            else; a GPU's context must be current there.
        owner: Kept alive as long as the slab.
        shared: The memory it is in, if peers on this host may map it.  They
            copy blocks into it themselves then, which is faster.

    >>> layout = Layout(model="m", dtype="u8", layers=2, block_tokens=1,
    ...                 block_bytes=8)
    >>> slab = Slab.of(np.zeros((2, 4, 8), np.uint8), layout)
    >>> slab.bases[1] - slab.bases[0]
    32
    """

    layout: Layout
    blocks: int
    bases: tuple[int, ...]
    memory: str = "DRAM"
    device: int = 0
    sums: Sums | None = None
    gathered: Sums | None = None
    enter: Callable[[], object] | None = None
    owner: Any = attrs.field(default=None, repr=False)
    shared: SharedMemory | None = None

    def __attrs_post_init__(self) -> None:
        if len(self.bases) != self.layout.layers:
            raise TransferError(
                f"{len(self.bases)} addresses for {self.layout.layers} layers"
            )

    @classmethod
    def of(
        cls,
        array: NDArray[np.uint8],
        layout: Layout,
        *,
        shared: SharedMemory | None = None,
    ) -> Slab:
        """Return the slab in *array*, C-contiguous, (layers, blocks, block_bytes).

        Args:
            array: The slab.
            layout: Of it.
            shared: The memory *array* is in, if that is to be shared.
        """
        if array.ndim != 3 or array.shape[::2] != (layout.layers, layout.block_bytes):
            raise TransferError(f"an array of shape {array.shape} for {layout}")
        if not array.flags.c_contiguous or array.dtype != np.uint8:
            raise TransferError("a slab is a C-contiguous array of bytes")
        if shared is not None and not shared.holds(array):
            raise TransferError("the slab does not lie in the memory to be shared")
        stride = array.shape[1] * layout.block_bytes
        bases = tuple([array.ctypes.data + i * stride for i in range(layout.layers)])
        return cls(
            layout=layout,
            blocks=array.shape[1],
            bases=bases,
            sums=Xxh3(packed(bases), layout.block_bytes, array.shape[1], array),
            owner=array,
            shared=shared,
        )

    @classmethod
    def allocate(cls, layout: Layout, blocks: int) -> Slab:
        """Return a new slab, zeroed, in memory that peers on this host may map.

        Its `owner` is the array, shape (layers, blocks, block_bytes).

        Raises:
            TransferError: There is no such memory here.

        >>> layout = Layout(model="m", dtype="u8", layers=2, block_tokens=1,
        ...                 block_bytes=8)
        >>> Slab.allocate(layout, 4).owner.shape
        (2, 4, 8)
        """
        if not isinstance(layout, Layout):
            raise TransferError(f"{shown(layout)} is no layout")
        if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1:
            raise TransferError(f"a slab of {shown(blocks)} blocks")
        shape = layout.layers, blocks, layout.block_bytes
        memory = SharedMemory(math.prod(shape))
        return cls.of(memory.array.reshape(shape), layout, shared=memory)

    def regions(self) -> list[tuple[int, int, int, str]]:
        """Return (address, bytes, device, "") of as few regions as cover it."""
        layer_bytes = self.blocks * self.layout.block_bytes
        merged: list[list[int]] = []
        for base in sorted(self.bases):
            if merged and merged[-1][0] + merged[-1][1] == base:
                merged[-1][1] += layer_bytes
            else:
                merged.append([base, layer_bytes])
        return [(base, length, self.device, "") for base, length in merged]


def descriptors(
    bases: tuple[int, ...], blocks: int, block_bytes: int, device: int
) -> NDArray[np.uint64]:
    """Return (address, bytes, device) of every block, layer by layer, (n, 3)."""
    rows = np.empty((len(bases), blocks, 3), dtype=np.uint64)
    offsets = np.arange(blocks, dtype=np.uint64) * np.uint64(block_bytes)
    rows[:, :, 0] = np.array(bases, dtype=np.uint64)[:, None] + offsets
    rows[:, :, 1], rows[:, :, 2] = block_bytes, device
    return rows.reshape(-1, 3)
