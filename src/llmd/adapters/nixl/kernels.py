"""Gather blocks into a contiguous slab and scatter them out, on a GPU.

One kernel over all layers: 28 launches of `index_select` cost more than the
copy they make, and `index_copy_` reaches a quarter of the bandwidth.  Blocks
are moved as 64-bit words, whatever is in them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from ...errors import TransferError
from ...transport.frames import Words
from ...transport.outbox import Blocks

_WORDS = 2048
"""Of a block that one program takes at once: 16 KiB."""
# Golden ratio times 2**63, odd: consecutive multiples share no low-order pattern.
_MIX = 0x1E3779B97F4A7C15


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["first_slot"],
    do_not_specialize_on_alignment=["bases", "index", "sums"],
)
def _move(
    bases,
    index,
    staged,
    sums,
    words,
    stride,
    slot_stride,
    slots,
    first_slot,
    gather: tl.constexpr,
    size: tl.constexpr,
):
    block = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    base = tl.load(bases + layer).to(tl.pointer_type(tl.int64))
    cached = base + tl.load(index + block) * stride
    slot = staged + layer * slot_stride + (first_slot + block).to(tl.int64) * words
    total = tl.zeros([size], dtype=tl.int64)
    for start in range(0, words, size):
        at = start + tl.arange(0, size)
        inside = at < words
        if gather:
            values = tl.load(cached + at, mask=inside, other=0)
            tl.store(slot + at, values, mask=inside)
            total += values * ((at.to(tl.int64) * 0x1E3779B97F4A7C15) | 1)
        else:
            values = tl.load(slot + at, mask=inside, other=0)
            tl.store(cached + at, values, mask=inside)
    if gather:
        tl.store(sums + layer * slots + first_slot + block, tl.sum(total, axis=0))


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["blocks"],
    do_not_specialize_on_alignment=["index", "sums"],
)
def _sum(slab, index, sums, blocks, words, slot_stride, size: tl.constexpr):
    block = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    row = slab + layer * slot_stride + tl.load(index + block) * words
    total = tl.zeros([size], dtype=tl.int64)
    for start in range(0, words, size):
        at = start + tl.arange(0, size)
        values = tl.load(row + at, mask=at < words, other=0)
        total += values * ((at.to(tl.int64) * 0x1E3779B97F4A7C15) | 1)
    tl.store(sums + layer * blocks + block, tl.sum(total, axis=0))


class Launch:
    """A kernel that is compiled once for all arguments of one `Stage`.

    Triton looks at the arguments anew at each launch, to choose among what it
    has compiled; that takes longer than the kernel runs.  It has to if blocks
    are no multiple of 16 bytes, as layers then differ in how they are aligned.
    """

    def __init__(self, kernel: Any, words: int) -> None:
        self._kernel, self._alike = kernel, words % 2 == 0
        self._compiled: Any = None

    def __call__(self, blocks: int, layers: int, *arguments: Any) -> None:
        """Run a program for each of some blocks in each of some layers."""
        grid = blocks, layers, 1
        if self._compiled is None or not self._alike:
            self._compiled = self._kernel[grid](*arguments)
        else:
            self._compiled[grid](*arguments)


class Stage:
    """Slots that blocks of caches pass through, with a checksum of each.

        sum of word[i] * (i * K | 1)  modulo 2**64

    sees every damaged word and every swap; it is no defence against forgery,
    which the seal of the frames that carry it is.

    Kernels read and write which slots and the sums in host memory themselves:
    copies would queue behind the writes of blocks.  What arrives is summed in a
    stream of its own, as the engine's may be busy for a long time.
    """

    def __init__(self, bases: Any, stride_words: int, slots: Any) -> None:
        """Take caches and slots.

        Args:
            bases: Address of each layer's cache, int64 on the GPU, (layers,).
            stride_words: From one block to the next in a cache, in 64-bit words.
            slots: Int64, contiguous, (layers, slots, block_words); on the GPU, or
                in host memory that is pinned.
        """
        layers, count, words = slots.shape
        self._bases, self._stride_words, self._slots = bases, stride_words, slots
        self._stream = torch.cuda.Stream(bases.device)
        pinned: Any = {"dtype": torch.int64, "pin_memory": True}
        self._gathered = torch.zeros((layers, count), **pinned)
        self._index = torch.empty(count, **pinned)
        self._arrived = torch.empty(layers * count, **pinned)
        self._moves = {way: Launch(_move, words) for way in (True, False)}
        self._check = Launch(_sum, words)

    def move(self, index: Any, first_slot: int, layers: slice, *, gather: bool) -> None:
        """Move blocks between the caches of some layers and a run of slots.

        Args:
            index: Blocks, int64 on the GPU, shape (n,).
            first_slot: Of the run.
            layers: Which.
            gather: Out of the caches; otherwise into them.
        """
        bases, slots, sums = self._bases, self._slots, self._gathered
        if layers != slice(None):
            bases, slots, sums = bases[layers], slots[layers], sums[layers]
        self._moves[gather](
            len(index),
            len(slots),
            *(bases, index, slots, sums),
            slots.shape[2],
            self._stride_words,
            slots.stride(0),
            slots.shape[1],
            first_slot,
            gather,
            _WORDS,
        )

    def gathered(self, first: int, last: int, slots: Blocks) -> Words:
        """Return the sums of *slots* as they were gathered, once they are.

        Args:
            first: Layer.
            last: Layer, not included.
            slots: Shape (n,).

        Returns:
            Layer by layer, shape ((last - first) * n,).
        """
        found = self._gathered.numpy()[first:last, slots]
        return np.ascontiguousarray(found).view(np.uint64).ravel()

    def sums(self, first: int, last: int, slots: Blocks) -> Words:
        """Return the sums of *slots* as they are now; for one thread."""
        count, layers = len(slots), self._slots[first:last]
        self._index[:count].numpy()[:] = slots
        with torch.cuda.device(self._bases.device), torch.cuda.stream(self._stream):
            self._check(
                count,
                last - first,
                *(layers, self._index, self._arrived),
                count,
                layers.shape[2],
                layers.stride(0),
                _WORDS,
            )
            self._stream.synchronize()
        found = self._arrived[: count * (last - first)].numpy()
        return np.array(found.view(np.uint64))


def pin(memory: Any) -> None:
    """Let the GPU read and write a tensor of host memory, which then stays in place.

    Raises:
        TransferError: CUDA refuses.
    """
    bytes = memory.numel() * memory.element_size()
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), bytes, 0)
    if int(error):
        raise TransferError(f"CUDA cannot pin {bytes} bytes of host memory: {error}")


def checksum(words: Any) -> Any:
    """Return what `Stage.sums` would of *words*, int64 (n, block_words), with torch."""
    at = torch.arange(words.shape[1], device=words.device, dtype=torch.int64)
    return (words * ((at * _MIX) | 1)).sum(dim=1)
