"""Which bit stands for which worker, and depths as an array over workers."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

from ..types import Tier, WorkerId
from ..view import Ints

_PAIRS = list[tuple[int, int]]


@attrs.define(eq=False)
class Seats:
    """Gives each worker a bit of its own."""

    _bits: dict[WorkerId, int] = attrs.field(factory=dict, init=False)
    _used: int = attrs.field(default=0, init=False)
    _asked: Sequence[WorkerId] = attrs.field(default=(), init=False)
    _rows: dict[int, int] = attrs.field(factory=dict, init=False)

    @property
    def all(self) -> int:
        """The bits of every worker."""
        return self._used

    def __contains__(self, worker: WorkerId) -> bool:
        return worker in self._bits

    def bit(self, worker: WorkerId) -> int:
        """Return the worker's bit; 0 if it has none."""
        return self._bits.get(worker, 0)

    def take(self, worker: WorkerId, busy: int = 0) -> int:
        """Return the worker's bit, giving it one that is not in *busy*."""
        bit = self._bits.get(worker)
        if bit is None:
            busy |= self._used
            bit = ~busy & (busy + 1)
            self._bits[worker] = bit
            self._used |= bit
            self._asked = ()
        return bit

    def leave(self, worker: WorkerId) -> int:
        """Take the worker's bit away and return it; 0 if it had none."""
        bit = self._bits.pop(worker, 0)
        self._used &= ~bit
        self._asked = ()
        return bit

    def rows(self, workers: Sequence[WorkerId]) -> dict[int, int]:
        """Return the row in *workers* of each bit."""
        if self._asked is not workers:
            self._rows = {
                self._bits[worker]: row
                for row, worker in enumerate(workers)
                if worker in self._bits
            }
            self._asked = workers
        return self._rows


def spread(found: _PAIRS, rows: dict[int, int], workers: int, scale: int) -> Ints:
    """Turn (bits, depth) pairs into depth * scale by row, shape (workers,)."""
    depths = [0] * workers
    for mask, depth in found:
        tokens = depth * scale
        while mask:
            low = mask & -mask
            mask ^= low
            row = rows.get(low)
            if row is not None:
                depths[row] = tokens
    return np.array(depths, dtype=np.int64)


def columns(depths: Ints) -> Ints:
    """Repeat depths of the fastest tier for every slower one, (W, tiers)."""
    held = np.empty((len(depths), len(Tier)), dtype=np.int64)
    held[:] = depths[:, None]
    return held
