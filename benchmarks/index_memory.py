"""index.bytes_per_block and index.forget.*: what a million blocks cost.

Memory is what the process asks the system for (`VmRSS`) in a child of its own
that does nothing but fill an index, less what it had before.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import _fleet
import numpy as np
from _timing import no_collection

import llmd
from llmd import Tier

BLOCKS = 1_000_000
WORKERS = 64
PROMPT_BLOCKS = 100


def measure() -> dict[str, float]:
    child = [sys.executable, str(Path(__file__)), "--fill"]
    filled = subprocess.run(child, capture_output=True, text=True, check=True)
    results = {"index.bytes_per_block": float(filled.stdout)}
    return results | forgetting()


def filled() -> llmd.ExactIndex:
    """Return an index of a million blocks, each held by one to four workers."""
    rng = np.random.default_rng(0)
    index = llmd.ExactIndex()
    ids = _fleet.ids(WORKERS)
    for id in ids:
        index.join(llmd.Worker(id=id, block_tokens=_fleet.BLOCK), 0.0)
    for _ in range(BLOCKS // PROMPT_BLOCKS):
        names = rng.integers(0, 1 << 63, PROMPT_BLOCKS).astype(np.uint64)
        for row in rng.choice(WORKERS, rng.integers(1, 5), replace=False).tolist():
            index.store(ids[row], names, _fleet.BLOCK, Tier.GPU, 0.0)
    return index


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmRSS in /proc/self/status")


def forgetting() -> dict[str, float]:
    """Time a worker of 50k blocks among 64 going, and the sweeping behind it."""
    ids = _fleet.ids(WORKERS)
    index = llmd.ExactIndex()
    rng = np.random.default_rng(0)
    for id in ids:
        index.join(llmd.Worker(id=id, block_tokens=_fleet.BLOCK), 0.0)
        names = rng.integers(0, 1 << 63, 50_000).astype(np.uint64)
        for part in np.split(names, 500):
            index.store(id, part, _fleet.BLOCK, Tier.GPU, 0.0)
    with no_collection():
        start = time.perf_counter()
        index.forget(ids[7], "", 1.0)
        at_once = time.perf_counter() - start
        start = time.perf_counter()
        while not index.swept:
            index.sweep(4096)
        behind = time.perf_counter() - start
    return {"index.forget.ms": at_once * 1e3, "index.forget.sweep.ms": behind * 1e3}


if __name__ == "__main__":
    before = resident_bytes()
    index = filled()
    print((resident_bytes() - before) / BLOCKS)
