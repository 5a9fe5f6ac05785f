"""Which bit stands for which worker, and where it stands in an array."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from ..types import Tier, WorkerId
from ..view import Ints

_PICKS_KEPT = 1 << 10
TIERS = len(Tier)
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
    # The row of each bit by its place; -1 where none of the workers has it.
    places: NDArray[np.int64] = attrs.field(init=False)
    view: memoryview = attrs.field(init=False)
    _known: int = attrs.field(default=0, init=False)
    _picks: dict[int, NDArray[np.int64]] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        places = max(self._row_of_bit, default=0).bit_length()
        self.places = np.full(places, -1, dtype=np.int64)
        for bit, row in self._row_of_bit.items():
            self.places[bit.bit_length() - 1] = row
            self._known |= bit
        self.view = self.places.data

    def __deepcopy__(self, memo: object) -> Rows:
        return self  # It says where bits stand, and that never changes.

    def __reduce__(self) -> tuple[type[Rows], tuple[object, ...]]:
        return Rows, (self.workers, self._row_of_bit)

    def nothing(self) -> Ints:
        """Return what workers hold of an unknown prompt, shape (W, tiers)."""
        return np.zeros((len(self.workers), TIERS), _INT64)

    def row(self, bit: int) -> int | None:
        """Return where the worker *bit* stands, if it does."""
        return self._row_of_bit.get(bit)

    def pick(self, mask: int) -> NDArray[np.int64]:
        """Return the rows of the workers *mask*."""
        pick = self._picks.get(mask)
        if pick is None:
            if len(self._picks) >= _PICKS_KEPT:
                self._picks.clear()
            pick = self._picks[mask] = self._rows_of(mask)
        return pick

    def _rows_of(self, mask: int) -> NDArray[np.int64]:
        mask &= self._known
        size = (mask.bit_length() + 7) // 8
        raw = np.frombuffer(mask.to_bytes(size, "little"), np.uint8)
        places = np.flatnonzero(np.unpackbits(raw, bitorder="little"))
        return self.places[places]


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
        # A list may have been changed since.
        if self._rows.workers is not workers or not isinstance(workers, tuple):
            bits = self._bits
            found = {bits[w]: row for row, w in enumerate(workers) if w in bits}
            self._rows = Rows(workers, found)
        return self._rows
