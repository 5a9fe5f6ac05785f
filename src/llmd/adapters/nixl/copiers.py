"""Threads that copy a large write together."""

from __future__ import annotations

from array import array
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise

import attrs
import numpy as np

from ...transport.outbox import Blocks
from .shared import Mapped

_WORTH_BYTES = 1 << 20
"""For a thread to be asked for."""


@attrs.define(eq=False)
class Copiers:
    """Copies blocks to where a peer is mapped, with several threads if that pays.

    One core copies a few GB a second, which is less than the memory could.

    Attributes:
        count: Threads, at most.

    >>> Copiers(1).close()
    """

    count: int
    _pool: ThreadPoolExecutor | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        if self.count > 1:
            self._pool = ThreadPoolExecutor(self.count, "llmd-copier")

    def copy(
        self,
        mapped: Mapped,
        bases: array[int],
        layer: int,
        blocks: Blocks,
        to: Blocks,
        *,
        summed: bool,
    ) -> bytes | None:
        """Do what `Mapped.copy` does; when it returns or raises, nothing moves."""
        pool, all_bytes = self._pool, len(blocks) * len(bases) * mapped.block_bytes
        if pool is None or all_bytes < 2 * _WORTH_BYTES:
            return mapped.copy(bases, layer, blocks, to, summed=summed)
        parts = min(self.count, len(blocks), all_bytes // _WORTH_BYTES)
        cuts = np.linspace(0, len(blocks), parts + 1).astype(int).tolist()
        runs = [slice(*cut) for cut in pairwise(cuts)]
        copies = [
            pool.submit(mapped.copy, bases, layer, blocks[run], to[run], summed=summed)
            for run in runs
        ]
        wait(copies)
        found = [copy.result() for copy in copies]
        if not summed:
            return None
        # Each has its blocks of all layers; together they are layer by layer.
        words = [np.frombuffer(sums or b"", np.uint64) for sums in found]
        rows = [part.reshape(len(bases), -1) for part in words]
        return np.concatenate(rows, axis=1).tobytes()

    def close(self) -> None:
        """Let the threads go."""
        if self._pool is not None:
            self._pool.shutdown()
