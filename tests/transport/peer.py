"""A process with a NIXL transport that does as it is told through a pipe."""

import contextlib
import multiprocessing as mp
import os
import signal
import time

import numpy as np

from llmd.transport import Layout, Settings

KEY = b"shared by those who may exchange"
LAYOUT = Layout(
    model="m", dtype="f32", layers=4, block_tokens=16, block_bytes=1 << 16, order="nhd"
)
# Nobody is silent for longer who only waits for a core.
QUICK = Settings(heartbeat_s=0.05, silence_s=1.5, idle_s=0.2)
BLOCKS = 64


def fill(seed):
    rng = np.random.default_rng(seed)
    shape = (LAYOUT.layers, BLOCKS, LAYOUT.block_bytes)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def slab_of(values, mapped):
    """Return a slab that peers map, or one that NIXL writes to."""
    from llmd.adapters.nixl import Slab

    if not mapped:
        return Slab.of(values, LAYOUT)
    slab = Slab.allocate(LAYOUT, BLOCKS)
    slab.owner[:] = values
    return slab


def transport(slab, **kwargs):
    from llmd.adapters.nixl import NixlTransport

    return NixlTransport(slab, KEY, settings=QUICK, **kwargs)


def damage_writes(times):
    """Flip a byte of the next writes on their way; memory here is as before."""
    from llmd.adapters.nixl.carrier import Carrier

    copy, sums, write = Carrier._copy, Carrier._sums, Carrier._write
    left, changed = [times], []

    def damaged_copy(self, what, mapped):
        """Copy, and change what was copied before the peer is told."""
        frame = copy(self, what, mapped)
        if left[0]:
            left[0] -= 1
            at = mapped.bases[what.layer] - mapped.memory.ctypes.data
            at += int(what.target[0]) * LAYOUT.block_bytes + 1234
            mapped.memory[at] ^= 1
        return frame

    def sums_before(self, first, last, blocks):
        """Checksum, and change what is about to be written."""
        found = sums(self, first, last, blocks)
        if left[0]:
            left[0] -= 1
            changed.append((first, blocks[0], 1234))
            self.slab.owner[changed[0]] ^= 1
        return found

    def changed_back(self, what):
        write(self, what)
        if changed:
            self.slab.owner[changed.pop()] ^= 1

    Carrier._copy, Carrier._sums = damaged_copy, sums_before
    Carrier._write = changed_back


def serve(pipe, seed, damaged, mapped):
    if damaged:
        damage_writes(damaged)
    slab = slab_of(fill(seed), mapped)
    mine = transport(slab)
    with mine, contextlib.suppress(EOFError):
        pipe.send(mine.address())
        while True:
            method, *arguments = pipe.recv()
            if method == "scribble":
                slab.owner[:, arguments[0]] = 255
                pipe.send(None)
            elif method == "counts":
                pipe.send(dict(mine.counts))
            elif method == "path":
                pipe.send(mine.path)
            else:
                pipe.send(getattr(mine, method)(*arguments))


class PeerProcess:
    """The process, its transport's address, and how to hurt it."""

    def __init__(self, seed=1, damaged=0, mapped=True):
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, seed, damaged, mapped), daemon=True
        )
        self.process.start()
        theirs.close()
        self.slab = fill(seed)
        self.address = self.receive()

    def receive(self):
        if not self.pipe.poll(60):
            raise TimeoutError("the peer's process is silent")
        return self.pipe.recv()

    def do(self, *call):
        self.pipe.send(call)
        return self.receive()

    def signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        if self.process.is_alive():
            self.signal(signal.SIGCONT)
            self.process.kill()
        self.process.join(10)


def wait_for(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return
        time.sleep(2e-3)
    raise TimeoutError("it never happened")
