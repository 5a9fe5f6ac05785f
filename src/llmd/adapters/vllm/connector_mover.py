"""Copies between an engine's caches and the slots of a slab."""

from __future__ import annotations

import abc
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...errors import TransferError
from ...transport.frames import Words
from ...transport.outbox import Blocks, Sums
from ..nixl.blocks import Xxh3, packed, xxh3

_log = logging.getLogger(__name__)
EVERY = slice(None)


class Mover(abc.ABC):
    """Moves blocks of many layers at once.

    Attributes:
        order: How a block's values lie in a slot.
        sums: Checksums slots of the layers from one to before another, as they
            are now.
        gathered: The same, as they were gathered; None where it is not known.
    """

    order: str
    sums: Sums
    gathered: Sums | None = None

    @abc.abstractmethod
    def gather(
        self, blocks: Sequence[int], slots: Sequence[int], layers: slice = EVERY
    ) -> None:
        """Copy blocks of the caches into slots, of some layers or all."""

    @abc.abstractmethod
    def scatter(self, slots: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy slots into blocks of the caches."""


def mover(layers: Sequence[Any], slab: Any) -> Mover:
    """Return the fastest way there is for these caches.

    Args:
        layers: Of the cache, each with its blocks along the first axis.
        slab: Bytes, shape (layers, slots, block_bytes); on the same device, or in
            host memory that is pinned.
    """
    if not layers[0].is_cuda:
        return TorchMover(layers, slab)
    if slab.shape[2] % 8 or not _dense(layers):
        _log.warning("blocks of the cache are not dense: KV moves layer by layer")
        return TorchMover(layers, slab)
    return KernelMover(layers, slab)


class TorchMover(Mover):
    """Moves one layer after the other with torch, on any device."""

    def __init__(self, layers: Sequence[Any], slab: Any) -> None:
        self._layers, self._slab = layers, slab
        self.sums = self._sums
        if slab.device.type == "cpu":
            bases = packed(layer.data_ptr() for layer in slab)
            self.sums = Xxh3(bases, slab.shape[2], slab.shape[1], slab)
        self.order = "x".join(map(str, layers[0].shape[1:]))

    def gather(
        self, blocks: Sequence[int], slots: Sequence[int], layers: slice = EVERY
    ) -> None:
        index, place = self._index(blocks), self._where(slots)
        pairs = zip(self._layers[layers], self._slab[layers], strict=True)
        for layer, staged in pairs:
            taken = layer.index_select(0, index).contiguous().to(staged.device)
            staged[place] = taken.view(len(taken), -1).view(torch.uint8)

    def scatter(self, slots: Sequence[int], blocks: Sequence[int]) -> None:
        index, place = self._index(blocks), self._where(slots)
        for layer, staged in zip(self._layers, self._slab, strict=True):
            values = staged[place].contiguous().to(layer.device).view(layer.dtype)
            layer[index] = values.view(len(blocks), *layer.shape[1:])

    def _sums(self, first: int, last: int, slots: Blocks) -> Words:
        return xxh3(self._slab[first:last].cpu().numpy(), slots)

    def _index(self, blocks: Sequence[int]) -> Any:
        return placed(blocks, self._layers[0].device)

    def _where(self, slots: Sequence[int]) -> Any:
        """Return *slots* as a slice if they are a run, which saves a copy."""
        if slots[-1] - slots[0] == len(slots) - 1:
            return slice(slots[0], slots[-1] + 1)
        return placed(slots, self._slab.device)


class KernelMover(Mover):
    """Moves all layers in one kernel for each run of slots, on a GPU."""

    def __init__(self, layers: Sequence[Any], slab: Any) -> None:
        from ..nixl.kernels import Stage

        first = layers[0]
        self._layers, self._device = layers, first.device
        bases = torch.tensor(
            [layer.data_ptr() for layer in layers],
            dtype=torch.int64,
            device=first.device,
        )
        stride_words = first.stride(0) * first.element_size() // 8
        self._stage = Stage(bases, stride_words, slab.view(torch.int64))
        self.gathered, self.sums = self._stage.gathered, self._stage.sums
        # Blocks are moved as they lie, so the strides are part of the order.
        self.order = f"{tuple(first.shape[1:])} by {first.stride()[1:]}"
        self._indexed: tuple[Sequence[int] | None, Any] = (None, None)
        self._compile()

    def _compile(self) -> None:
        """Move a block there and back, so that no hand-off waits for compilers."""
        self.gather([0], [0])
        self.scatter([0], [0])
        self.sums(0, 1, np.zeros(1, np.int32))

    def gather(
        self, blocks: Sequence[int], slots: Sequence[int], layers: slice = EVERY
    ) -> None:
        self._move(blocks, slots, layers, gather=True)

    def scatter(self, slots: Sequence[int], blocks: Sequence[int]) -> None:
        self._move(blocks, slots, EVERY, gather=False)

    def _index(self, blocks: Sequence[int]) -> Any:
        of, index = self._indexed
        if of is not blocks:  # layer after layer moves the same
            index = placed(blocks, self._device)
            self._indexed = blocks, index
        return index

    def _move(
        self,
        blocks: Sequence[int],
        slots: Sequence[int],
        layers: slice,
        *,
        gather: bool,
    ) -> None:
        index = self._index(blocks)
        for start, stop in runs(slots):
            self._stage.move(index[start:stop], slots[start], layers, gather=gather)


def placed(numbers: Sequence[int], device: Any) -> Any:
    """Return *numbers* as int64 on a device, in order with what it is to do.

    From pinned memory, as a copy from any other has who asks wait until a GPU has
    done all that was launched before: an engine would launch no step ahead.
    """
    pinned = device.type == "cuda"
    there = torch.tensor(numbers, dtype=torch.int64, pin_memory=pinned)
    return there.to(device, non_blocking=True)


def runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Return where runs of consecutive slots begin and end in *slots*.

    >>> runs([4, 5, 6, 9, 10])
    [(0, 3), (3, 5)]
    """
    breaks = np.flatnonzero(np.diff(np.asarray(slots)) != 1) + 1
    edges = [0, *breaks.tolist(), len(slots)]
    return list(itertools.pairwise(edges))


def by_block(name: str, cache: Any, blocks: int) -> Any:
    """View a cache with its blocks along the first axis.

    Raises:
        TransferError: No axis has as many entries as there are blocks.
    """
    for axis in range(min(2, cache.dim())):
        if cache.shape[axis] == blocks:
            return cache.movedim(axis, 0)
    raise TransferError(
        f"the cache of {name}, {tuple(cache.shape)}, has no axis of {blocks} blocks"
    )


def _dense(layers: Sequence[Any]) -> bool:
    """Say whether each block is one piece of memory, alike in all layers."""
    first = layers[0]
    shape, strides = first.shape[1:], first.stride()[1:]
    spanned = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    return spanned == first[0].numel() and all(
        layer.stride() == first.stride() for layer in layers
    )
