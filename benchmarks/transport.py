"""Measure the NIXL transport between two processes over DRAM.

    python benchmarks/transport.py

`measure()` returns the figures of `bench.json`; each is a median of several
rounds after a warm-up.  Time runs from the call that lets the source go until
the target has verified the last byte, on the one monotonic clock that all
processes of a Linux machine share.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import statistics
import threading
import time
from multiprocessing.connection import Connection

import numpy as np

from llmd.adapters.nixl import NixlTransport, Slab
from llmd.transport import Fetch, Layout, Offer, TransferEnded, TransferId

KEY = b"benchmark of one machine, no secret"
MOVED_BYTES = 128 << 20
ROUNDS = 9
WAYS = {
    "": {},
    ".unchecked": {"checksums": False},
    ".nixl": {"mapped": False},
    ".nixl.unchecked": {"mapped": False, "checksums": False},
}
"""A slab that peers map and one that NIXL writes to, checksums on and off."""


def layout_of(block_bytes: int, layers: int = 1) -> Layout:
    return Layout(
        model="none",
        dtype="u8",
        layers=layers,
        block_tokens=1,
        block_bytes=block_bytes,
    )


def filled(array: np.ndarray) -> np.ndarray:
    """Fill an array of blocks: zeros would share one page."""
    length = array.shape[-1]
    array[:] = np.arange(251, dtype=np.uint8)[np.arange(length) % 251]
    return array


def open_slab(layout: Layout, blocks: int, mapped: bool) -> Slab:
    """Return a slab that peers map, or one that NIXL writes to."""
    if mapped:
        slab = Slab.allocate(layout, blocks)
        filled(slab.owner)
        return slab
    shape = layout.layers, blocks, layout.block_bytes
    return Slab.of(filled(np.empty(shape, np.uint8)), layout)


class Awaited:
    """Waits for reports; the time of each is when it could be polled."""

    def __init__(self) -> None:
        self.woken_at: list[float] = []
        self.woken = threading.Event()

    def wake(self) -> None:
        self.woken_at.append(time.monotonic())
        self.woken.set()

    def end(self, transport: NixlTransport, id: TransferId) -> tuple[float, str | None]:
        while self.woken.wait(30.0):
            self.woken.clear()
            at = self.woken_at[0]
            for report in transport.poll():
                if isinstance(report, TransferEnded) and report.id == id:
                    return at, report.error
            self.woken_at.clear()
        raise TimeoutError(f"{id} never ended; {transport.counts}")


def keep_to_core(number: int) -> set[int]:
    """Keep this process to a core of its own, if there is one; return what it had.

    Otherwise two that look out for each other without a rest are at times given
    one core to share while another idles.
    """
    had = os.sched_getaffinity(0)
    if number < len(had):
        os.sched_setaffinity(0, {sorted(had)[number]})
    return had


def target_process(pipe: Connection) -> None:
    """Serve fetches in the order the source's process names them."""
    keep_to_core(1)
    while (job := pipe.recv()) is not None:
        layout, blocks, checksums, mapped, address = job
        slab = open_slab(layout, blocks, mapped)
        slab.owner[:] = 0
        awaited = Awaited()
        with NixlTransport(slab, KEY, checksums=checksums, wake=awaited.wake) as mine:
            peer = mine.connect(address)
            pipe.send("connected")
            while (wanted := pipe.recv()) is not None:
                id, order = wanted
                awaited.woken_at.clear()
                mine.fetch(Fetch(id=id, peer=peer, blocks=order, early=True))
                pipe.send("asked")
                pipe.send(awaited.end(mine, id))


class Pair:
    """A source here and a target in another process."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target_process, args=(theirs,))
        self.process.start()
        self.cores = keep_to_core(0)

    def close(self) -> None:
        os.sched_setaffinity(0, self.cores)
        self.pipe.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()

    def receive(self):
        if not self.pipe.poll(60):
            raise TimeoutError("the target's process is silent")
        return self.pipe.recv()

    def rounds(
        self,
        layout,
        blocks,
        count,
        rounds,
        between=lambda: None,
        *,
        checksums=True,
        mapped=True,
        layer_s=0.0,
    ):
        """Return the seconds of each round; of the tail, if layers take time.

        *between* is called before each.
        """
        slab = open_slab(layout, blocks, mapped)
        rng = np.random.default_rng(0)
        seconds = []
        with NixlTransport(slab, KEY, checksums=checksums) as mine:
            self.pipe.send((layout, blocks, checksums, mapped, mine.address()))
            assert self.receive() == "connected"
            for i in range(rounds + 2):
                between()
                id = TransferId.fresh(str(i))
                # First all, as memory that nobody has touched is not there yet.
                some = count if i else blocks
                source = rng.permutation(blocks)[:some].tolist()
                self.pipe.send((id, rng.permutation(blocks)[:some].tolist()))
                assert self.receive() == "asked"
                time.sleep(5e-4)  # the early fetch gets there; both ends are awake
                mine.offer(Offer(id=id, blocks=source, ready=False))
                for layer in range(layout.layers):
                    if layer_s:
                        time.sleep(layer_s)  # what the model would compute meanwhile
                    begun = time.monotonic()
                    mine.ready(id, layer)
                at, error = self.receive()
                assert error is None, error
                seconds.append(at - begun)
                mine.poll()
            self.pipe.send(None)
        return seconds[2:]


def raw_agent(name: str, pipe: Connection):
    """Return an agent with 256 blocks of 64 KiB, and the lists of both ends."""
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False))
    blocks = filled(np.empty((256, 1 << 16), np.uint8))
    own = blocks.ctypes.data
    agent.register_memory([(own, blocks.nbytes, 0, "")], "DRAM")
    pipe.send((agent.get_agent_metadata(), own))
    metadata, theirs = pipe.recv()
    peer = agent.add_remote_agent(metadata)
    peer = peer.decode() if isinstance(peer, bytes) else peer

    def listed(of: str, base: int):
        rows = [(base + i * (1 << 16), 1 << 16, 0) for i in range(256)]
        return agent.prep_xfer_dlist(of, agent.get_xfer_descs(rows, "DRAM"))

    return agent, blocks, listed("NIXL_INIT_AGENT", own), listed(peer, theirs)


def raw_target(pipe: Connection, rounds: int) -> None:
    keep_to_core(1)
    agent, *kept = raw_agent("raw target", pipe)
    for _ in range(rounds):
        pipe.send("ready")
        while not agent.get_new_notifs():
            pass
        pipe.send(time.monotonic())
    pipe.recv()
    del kept  # not before: the other end writes into it


def raw_small_s(rounds: int = 200) -> float:
    """A block of 64 KiB by NIXL alone, both ends in a loop that does nothing else.

    No frame, no checksum, no thread: what is left for a transport to add to.
    """
    context = mp.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=raw_target, args=(theirs, rounds), daemon=True)
    process.start()
    cores = keep_to_core(0)
    agent, blocks, local, remote = raw_agent("raw source", pipe)
    rng, seconds = np.random.default_rng(0), []
    for _ in range(rounds):
        assert pipe.poll(60)
        assert pipe.recv() == "ready"
        time.sleep(5e-4)
        at = rng.integers(0, len(blocks), 1, dtype=np.int32)
        begun = time.monotonic()
        handle = agent.make_prepped_xfer("WRITE", local, at, remote, at, b"x")
        agent.transfer(handle)
        while agent.check_xfer_state(handle) == "PROC":
            pass
        while not pipe.poll(0):
            agent.get_new_notifs()  # sends what the peer waits for
        seconds.append(pipe.recv() - begun)
        agent.release_xfer_handle(handle)
    pipe.send(None)
    process.join(10)
    os.sched_setaffinity(0, cores)
    return statistics.median(seconds)


class Copies:
    """Copies of scattered blocks within this process, as a yardstick."""

    def __init__(self, block_bytes: int) -> None:
        blocks = 2 * MOVED_BYTES // block_bytes
        self.source = filled(np.empty((blocks, block_bytes), np.uint8))
        self.target = np.zeros_like(self.source)
        self.order = np.random.default_rng(1).permutation(blocks)[: blocks // 2]
        self.seconds: list[float] = []

    def __call__(self) -> None:
        begun = time.perf_counter()
        for i in self.order:
            self.target[i] = self.source[i]
        self.seconds.append(time.perf_counter() - begun)


def measure() -> dict[str, float]:
    figures: dict[str, float] = {}
    pair = Pair()
    try:
        for name, block_bytes in (("256k", 1 << 18), ("1m", 1 << 20)):
            count = MOVED_BYTES // block_bytes
            copies = Copies(block_bytes)
            for suffix, options in WAYS.items():
                copies.seconds.clear()
                seconds = pair.rounds(
                    layout_of(block_bytes), 2 * count, count, ROUNDS, copies, **options
                )
                # Each beside its own yardstick: the machine is shared.
                ratios = np.array(copies.seconds[2:]) / seconds
                rate = MOVED_BYTES / statistics.median(seconds)
                figures[f"transport.dram.gb_per_s.{name}{suffix}"] = rate / 1e9
                figures[f"transport.dram.ratio_to_memcpy.{name}{suffix}"] = float(
                    np.median(ratios)
                )
            copied = MOVED_BYTES / statistics.median(copies.seconds)
            figures[f"transport.dram.memcpy_gb_per_s.{name}"] = copied / 1e9
        for suffix, options in WAYS.items():
            small = pair.rounds(layout_of(1 << 16), 256, 1, 200, **options)
            figures[f"transport.small{suffix}.us"] = 1e6 * statistics.median(small)
        tails = pair.rounds(layout_of(1 << 16, 16), 64, 32, 5, layer_s=0.010)
        figures["transport.overlap.tail_ms"] = 1e3 * statistics.median(tails)
    finally:
        pair.close()
    figures["transport.small.raw.us"] = 1e6 * raw_small_s()
    return figures


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
