"""Which bit stands for which worker, and depths as an array over workers."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from ..types import Tier, WorkerId
from ..view import Ints

_PICKS_KEPT = 1 << 10
_TIERS = len(Tier)
_INT64 = np.dtype(np.int64)


@attrs.define(eq=False)
class Rows:
    """Where the workers of each set of bits stand in an array, remembered.

    The same sets come again and again (all that hold the system prompt, the
    one that holds a conversation), so that filling in depths needs no loop
    over bits.
    """

    workers: Sequence[WorkerId]
    _row_of_bit: dict[int, int]
    _row_of_place: NDArray[np.intp] = attrs.field(init=False)
    _known: int = attrs.field(default=0, init=False)
    _picks: dict[int, int | NDArray[np.intp]] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        places = max(self._row_of_bit, default=0).bit_length()
        self._row_of_place = np.zeros(places, dtype=np.intp)
        for bit, row in self._row_of_bit.items():
            self._row_of_place[bit.bit_length() - 1] = row
            self._known |= bit

    def depths(self, found: list[tuple[int, int]], scale: int) -> Ints:
        """Turn (bits, depth) pairs into depth * scale by row, shape (W,)."""
        depths: Ints = np.zeros(len(self.workers), _INT64)
        picks = self._picks
        for mask, depth in found:
            pick = picks.get(mask)
            if pick is None:
                pick = self._pick(mask)
            depths[pick] = depth * scale
        return depths

    def row(self, bit: int) -> int | None:
        """Return where the worker *bit* stands, if it does."""
        return self._row_of_bit.get(bit)

    def _pick(self, mask: int) -> int | NDArray[np.intp]:
        row = self._row_of_bit.get(mask)
        pick = self._rows_of(mask) if row is None else row
        if len(self._picks) >= _PICKS_KEPT:
            self._picks.clear()
        self._picks[mask] = pick
        return pick

    def _rows_of(self, mask: int) -> NDArray[np.intp]:
        mask &= self._known
        size = (mask.bit_length() + 7) // 8
        raw = np.frombuffer(mask.to_bytes(size, "little"), np.uint8)
        places = np.flatnonzero(np.unpackbits(raw, bitorder="little"))
        return self._row_of_place[places]


@attrs.define(eq=False)
class Seats:
    """Gives each worker a bit of its own."""

    _bits: dict[WorkerId, int] = attrs.field(factory=dict, init=False)
    _used: int = attrs.field(default=0, init=False)
    _rows: Rows = attrs.field(factory=lambda: Rows((), {}), init=False)

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
            self._rows = Rows((), {})
        return bit

    def leave(self, worker: WorkerId) -> int:
        """Take the worker's bit away and return it; 0 if it had none."""
        bit = self._bits.pop(worker, 0)
        self._used &= ~bit
        self._rows = Rows((), {})
        return bit

    def rows(self, workers: Sequence[WorkerId]) -> Rows:
        """Return where *workers*, by identity, stand in an array of them."""
        if self._rows.workers is not workers:
            bits = self._bits
            found = {bits[w]: row for row, w in enumerate(workers) if w in bits}
            self._rows = Rows(workers, found)
        return self._rows


def columns(depths: Ints) -> Ints:
    """Show depths of the fastest tier as those of every tier, (W, tiers).

    Nothing is copied, so the result is read-only.
    """
    held: Ints = np.ndarray((len(depths), _TIERS), _INT64, depths, 0, (8, 0))
    held.setflags(write=False)
    return held
