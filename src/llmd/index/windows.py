"""Depths where holding a prefix does not mean holding all shorter ones.

A sliding-window layer reads the last tokens only, so its engine frees blocks
from the head of a prompt and still counts the rest as cached: a prefix of d
blocks is usable if the blocks that its window reaches are held.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..hashing import Hashes


def depth(
    find: Callable[[int, int], int], names: Hashes, bit: int, window_blocks: int
) -> int:
    """Return how many leading blocks the worker *bit* may skip, O(blocks).

    Args:
        find: Returns the holders of a name, as `dict.get` does.
        names: Shape (n,), each a prefix of the next.
        bit: The worker.
        window_blocks: Blocks before a token that its window may reach into.

    >>> held = {12: 1, 13: 1}
    >>> depth(held.get, np.array([10, 11, 12, 13, 14], np.uint64), 1, 2)
    4
    >>> depth(held.get, np.array([10, 11, 12, 13, 14], np.uint64), 1, 3)
    0
    """
    held = np.array([find(name, 0) & bit for name in names.tolist()], dtype=bool)
    ends: npt.NDArray[np.intp] = np.arange(1, len(held) + 1)
    # A run of held blocks ends at each place; its length is the distance to the
    # last gap before it.
    gaps = np.maximum.accumulate(np.where(held, 0, ends))
    usable = held & (ends - gaps >= np.minimum(ends, window_blocks))
    return int(ends[usable][-1]) if usable.any() else 0


def blocks(window_tokens: int, block_tokens: int) -> int:
    """Return the blocks that a window of *window_tokens* reaches into.

    The token itself is one of them, so the window sees one less before it, as
    in vLLM's `SlidingWindowManager`.

    >>> blocks(33, 16), blocks(34, 16)
    (2, 3)
    """
    return max(-(-(window_tokens - 1) // block_tokens), 1)
