"""A slab that KV passes through on its way in or out of an engine's caches."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch

from ...errors import TransferError
from ...transport.interface import Layout
from ...transport.outbox import Settings
from ..nixl.shared import SharedMemory
from ..nixl.slab import Slab
from .connector_mover import EVERY, by_block, mover

_log = logging.getLogger(__name__)
_CROSSING_COPIERS = 8
_CROSSING_PIECE_BYTES = 1 << 25
"""Each is checked by a kernel, which has to be launched, while the next is copied."""


@attrs.define(eq=False)
class Slots:
    """Which slots of a slab are free; prefers runs, which are written at once.

    >>> slots = Slots(6)
    >>> slots.take(4), slots.take(3)
    ([0, 1, 2, 3], None)
    >>> slots.give([1, 2])
    >>> slots.take(3)
    [1, 2, 4]
    """

    count: int
    _free: Any = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._free = np.ones(self.count, dtype=np.bool_)

    @property
    def free(self) -> int:
        """How many are free."""
        return int(self._free.sum())

    def take(self, wanted: int) -> list[int] | None:
        """Return *wanted* slots, or None if there are not as many."""
        if wanted == 0:
            return []
        free = np.flatnonzero(self._free)
        if len(free) < wanted:
            return None
        starts = free[: len(free) - wanted + 1]
        whole = np.flatnonzero(free[wanted - 1 :] - starts == wanted - 1)
        first = int(whole[0]) if len(whole) else 0
        taken = free[first : first + wanted]
        self._free[taken] = False
        return [int(slot) for slot in taken]

    def give(self, slots: Sequence[int]) -> None:
        """Take slots back."""
        self._free[list(slots)] = True


class Staging:
    """Gathers blocks of an engine's caches into a slab and scatters them out.

    On a GPU both are kernels on the engine's own stream, so they are in order
    with its steps.

    Attributes:
        names: Of the layers, in their order in the slab.
        slots: Which of the slab are free.
    """

    def __init__(
        self,
        caches: Mapping[str, Any],
        vllm_config: Any,
        staging_bytes: int,
        *,
        through_host: bool = False,
    ) -> None:
        """Make the slab.

        Args:
            caches: The engine's cache of each layer, by name.
            vllm_config: Of the engine.
            staging_bytes: Of the slab, at most.
            through_host: In host memory, whatever the caches are in.

        Raises:
            TransferError: The layers differ, or have no axis of blocks.
        """
        self.names = tuple(caches)
        blocks = vllm_config.cache_config.num_gpu_blocks
        layers = [by_block(name, cache, blocks) for name, cache in caches.items()]
        first = layers[0]
        if any(layer.shape != first.shape for layer in layers):
            raise TransferError("layers whose caches differ in shape are not supported")
        block_bytes = first[0].numel() * first.element_size()
        count = max(1, staging_bytes // (block_bytes * len(layers)))
        self._device = first.device
        self._memory, self._tensor = _slab(
            (len(layers), count, block_bytes), first.device, through_host=through_host
        )
        self._mover = mover(layers, self._tensor)
        model = vllm_config.model_config
        self._layout = Layout(
            model=f"{os_name(model.model)} {model.quantization or ''}".strip(),
            dtype=str(first.dtype).removeprefix("torch."),
            layers=len(layers),
            block_tokens=vllm_config.cache_config.block_size,
            block_bytes=block_bytes,
            order=self._mover.order,
        )
        self.slots = Slots(count)
        self._pending: list[tuple[Any, list[int]]] = []

    def slab(self) -> Slab:
        """Return the slab as a transport takes it."""
        tensor, layout = self._tensor, self._layout
        bases = tuple([layer.data_ptr() for layer in tensor])
        device, gpu = self._device, self._device.type == "cuda"
        return Slab(
            layout=layout,
            blocks=self.slots.count,
            bases=bases,
            memory="VRAM" if tensor.is_cuda else "DRAM",
            device=device.index or 0 if tensor.is_cuda else 0,
            sums=self._mover.sums,
            gathered=self._mover.gathered,
            enter=(lambda: torch.cuda.set_device(device)) if gpu else None,
            owner=tensor,
            shared=self._memory,
        )

    @property
    def settings(self) -> Settings | None:
        """How blocks are best cut, where the kind of memory does not tell."""
        crossing = self._device.type == "cuda" and not self._tensor.is_cuda
        if not crossing:
            return None
        cores = len(os.sched_getaffinity(0))
        copiers = max(1, min(_CROSSING_COPIERS, cores // 2))
        return Settings(piece_bytes=_CROSSING_PIECE_BYTES, copiers=copiers)

    def gather(
        self, blocks: Sequence[int], slots: Sequence[int], layers: slice = EVERY
    ) -> None:
        """Copy blocks of the caches into slots, of some layers or all."""
        self._mover.gather(blocks, slots, layers)

    def scatter(self, slots: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy slots into blocks of the caches."""
        self._mover.scatter(slots, blocks)

    def mark(self) -> Any:
        """Return an event after all that was gathered so far; None if it is done."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def give_when_done(self, slots: list[int]) -> None:
        """Take slots back once nothing reads them any more."""
        self._pending.append((self.mark(), slots))
        while self._pending and (
            self._pending[0][0] is None or self._pending[0][0].query()
        ):
            self.slots.give(self._pending.pop(0)[1])


def _slab(
    shape: tuple[int, int, int], device: Any, *, through_host: bool
) -> tuple[SharedMemory | None, Any]:
    """Return a slab of bytes, in memory that peers on this host map if it can be."""
    if device.type == "cuda" and not through_host:
        return None, torch.empty(shape, dtype=torch.uint8, device=device)
    try:
        memory = SharedMemory(math.prod(shape))
        tensor = torch.from_numpy(memory.array).view(shape)
    except TransferError as error:
        _log.warning("peers on this host go through the kernel: %s", error)
        memory, tensor = None, torch.empty(shape, dtype=torch.uint8)
    if device.type == "cuda":
        from ..nixl.kernels import pin

        pin(tensor)
    return memory, tensor


def os_name(path: str) -> str:
    """Return the last part of a model's path: it may lie elsewhere on each host."""
    return path.rstrip("/").rpartition("/")[2]
