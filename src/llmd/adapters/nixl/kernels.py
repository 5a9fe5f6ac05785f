"""Gather blocks into a contiguous slab and scatter them out, on a GPU.

One kernel over all layers: 28 launches of `index_select` cost more than the
copy they make, and `index_copy_` reaches a quarter of the bandwidth.  Blocks
are moved as 64-bit words, whatever is in them.

    sum of word[i] * (i * K | 1)  modulo 2**64

is the checksum of a block, taken while it is moved.  It sees every damaged
word and every swap; it is no defence against forgery, which the seal of the
frames that carry it is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_WORDS = 2048
"""Of a block that one program moves: 16 KiB."""
# Golden ratio times 2**63, odd: consecutive multiples share no low-order pattern.
_MIX = 0x1E3779B97F4A7C15


@triton.jit  # type: ignore[untyped-decorator]
def _move(
    bases,
    index,
    staged,
    sums,
    blocks,
    words,
    stride,
    slot_stride,
    first_slot,
    gather: tl.constexpr,
    summed: tl.constexpr,
    size: tl.constexpr,
):
    part = tl.program_id(0)
    block = tl.program_id(1)
    layer = tl.program_id(2)
    at = part * size + tl.arange(0, size)
    inside = at < words
    base = tl.load(bases + layer).to(tl.pointer_type(tl.int64))
    cached = base + tl.load(index + block) * stride + at
    slot = staged + layer * slot_stride + (first_slot + block).to(tl.int64) * words + at
    if gather:
        values = tl.load(cached, mask=inside, other=0)
        tl.store(slot, values, mask=inside)
    else:
        values = tl.load(slot, mask=inside, other=0)
        tl.store(cached, values, mask=inside)
    if summed:
        weights = (at.to(tl.int64) * 0x1E3779B97F4A7C15) | 1
        total = tl.sum(values * weights, axis=0)
        tl.atomic_add(sums + layer * blocks + block, total)


@triton.jit  # type: ignore[untyped-decorator]
def _sum(slab, index, sums, blocks, words, slot_stride, size: tl.constexpr):
    part = tl.program_id(0)
    block = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    at = part * size + tl.arange(0, size)
    row = slab + layer * slot_stride + tl.load(index + block) * words
    values = tl.load(row + at, mask=at < words, other=0)
    weights = (at.to(tl.int64) * 0x1E3779B97F4A7C15) | 1
    tl.atomic_add(sums + layer * blocks + block, tl.sum(values * weights, axis=0))


def move(
    bases: Any,
    index: Any,
    staged: Any,
    first_slot: int,
    *,
    block_words: int,
    stride_words: int,
    gather: bool,
    sums: Any = None,
) -> None:
    """Move blocks between the caches of all layers and a run of slots.

    Args:
        bases: Address of each layer's cache, int64 on the GPU, shape (layers,).
        index: Blocks, int64 on the GPU, shape (n,).
        staged: Slots, int64, contiguous, shape (layers, slots, block_words).
        first_slot: Of the run.
        block_words: 64-bit words of one block in one layer.
        stride_words: From one block to the next in a cache.
        gather: Out of the caches; otherwise into them.
        sums: Takes checksums, int64, zeros, shape (layers, n); None for none.
    """
    layers, count = staged.shape[0], len(index)
    grid = (triton.cdiv(block_words, _WORDS), count, layers)
    _move[grid](
        bases,
        index,
        staged,
        staged if sums is None else sums,
        count,
        block_words,
        stride_words,
        staged.stride(0),
        first_slot,
        gather=gather,
        summed=sums is not None,
        size=_WORDS,
    )


def sum_of(slab: Any, index: Any) -> Any:
    """Return the checksums of blocks of layers of a slab, int64, (layers, n).

    Args:
        slab: Int64 on the GPU, each layer contiguous, shape (layers, slots,
            block_words).
        index: Slots, int64 on the GPU, shape (n,).
    """
    layers, _, words = slab.shape
    sums = torch.zeros((layers, len(index)), dtype=torch.int64, device=slab.device)
    _sum[(triton.cdiv(words, _WORDS), len(index), layers)](
        slab, index, sums, len(index), words, slab.stride(0), size=_WORDS
    )
    return sums


def checksum(words: Any) -> Any:
    """Return what `move` would sum of *words*, int64 (n, block_words), with torch."""
    at = torch.arange(words.shape[1], device=words.device, dtype=torch.int64)
    return (words * ((at * _MIX) | 1)).sum(dim=1)
