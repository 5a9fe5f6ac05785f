"""Measure ways to hand KV over between two processes of one GPU, or of two.

    PYTHONPATH=src python benchmarks/gpu/transport.py [--only PART] [--visible 0,1 1,0]

Needs torch with CUDA, nixl, attrs, numpy; triton, xxhash and CUDA IPC for some
variants.  256 MiB in 4096 scattered blocks of 64 KiB go from one process to
another, to scattered blocks there, and are compared on arrival.  Each variant
runs in a fresh pair of processes with a time limit, so one that fails costs
nothing but itself.  `--visible` says which GPUs source and target see, their own
first.  The last line printed is the result as JSON.

Time is from before the source's first kernel until the target's last kernel has
ended, on the monotonic clock that both share; the best and the median of the
rounds after two to warm up.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import random
import statistics
import subprocess
import sys
import threading
import time
import traceback

# "cpu" tries everything but CUDA on a machine without a GPU; its figures say nothing.
DEVICE = os.environ.get("LLMD_DEVICE", "cuda")
MEMORY = "VRAM" if DEVICE == "cuda" else "DRAM"
BLOCKS, BLOCK_BYTES, LAYERS = 4096 if DEVICE == "cuda" else 512, 1 << 16, 16
BYTES = BLOCKS * BLOCK_BYTES
PER_LAYER = BLOCKS // LAYERS
ROUNDS, WARM_UP = 7, 2
LIMIT_S = 45
KEY = b"one machine, one run, no secret at all"


class End:
    """One process: a pool of twice as many blocks as are moved, and a slab."""

    def __init__(self, role, pipe):
        import torch

        self.torch, self.role, self.pipe = torch, role, pipe
        if DEVICE == "cuda":
            torch.cuda.init()
        order = random.Random(7)
        self.source = self._pick(order)
        self.target = self._pick(order)
        shape = (LAYERS, 2 * PER_LAYER, BLOCK_BYTES)
        generator = torch.Generator(DEVICE).manual_seed(3)
        filled = torch.randint(
            0, 256, shape, dtype=torch.uint8, device=DEVICE, generator=generator
        )
        index = torch.tensor(self.source, device=DEVICE)
        # What must be there in the end; both processes draw the same bytes.
        self.wanted = filled[:, index].clone() if role == "target" else None
        self.pool = filled if role == "source" else torch.zeros_like(filled)
        self.stage = torch.empty(
            (LAYERS, PER_LAYER, BLOCK_BYTES), dtype=torch.uint8, device=DEVICE
        )
        mine = self.source if role == "source" else self.target
        self.index = torch.tensor(mine, dtype=torch.int64, device=DEVICE)
        self.sync()

    @staticmethod
    def _pick(order):
        return order.sample(range(2 * PER_LAYER), PER_LAYER)

    def tell(self, *message):
        self.pipe.send(message)

    def hear(self):
        if not self.pipe.poll(LIMIT_S):
            raise TimeoutError("the other process is silent")
        return self.pipe.recv()

    def sync(self):
        if DEVICE == "cuda":
            self.torch.cuda.synchronize()

    def mark(self):
        """Return what waits for all kernels so far."""
        if DEVICE != "cuda":
            return lambda: None
        event = self.torch.cuda.Event()
        event.record()
        return event.synchronize

    def right(self):
        index = self.torch.tensor(self.target, device=DEVICE)
        same = bool((self.pool[:, index] == self.wanted).all().item())
        self.pool.zero_()
        self.sync()
        return same


def stage(end):
    """Return what gathers, scatters and checksums, after a look at whether it does."""
    import numpy

    from llmd.adapters.nixl.kernels import Stage, checksum

    torch = end.torch
    addresses = [layer.data_ptr() for layer in end.pool]
    bases = torch.tensor(addresses, dtype=torch.int64, device=DEVICE)
    words = end.stage.view(torch.int64)
    made = Stage(bases, BLOCK_BYTES // 8, words)
    made.move(end.index, 0, slice(None), gather=True)
    end.sync()
    slots = numpy.array([3, 0, PER_LAYER - 1])
    picked = words[2:4][:, torch.from_numpy(slots).to(words.device)]
    wanted = checksum(picked.flatten(0, 1)).cpu().numpy().view("uint64")
    assert (made.gathered(2, 4, slots) == wanted).all(), "wrong checksums"
    assert (made.sums(2, 4, slots) == wanted).all(), "wrong checksums"
    return made


def kernels(end):
    """Return gather(layers) and scatter(layers), one kernel over those layers."""
    if DEVICE != "cuda":
        return torch_moves(end)
    made = stage(end)
    return (
        lambda first=0, last=LAYERS: made.move(
            end.index, 0, slice(first, last), gather=True
        ),
        lambda first=0, last=LAYERS: made.move(
            end.index, 0, slice(first, last), gather=False
        ),
    )


def torch_moves(end):
    """Return the same with torch's own kernels, a layer at a time."""

    def gather(first=0, last=LAYERS):
        for layer in range(first, last):
            end.torch.index_select(end.pool[layer], 0, end.index, out=end.stage[layer])

    def scatter(first=0, last=LAYERS):
        for layer in range(first, last):
            end.pool[layer].index_copy_(0, end.index, end.stage[layer])

    return gather, scatter


def agents(end, threads=0, pool=False):
    """Return an agent with the slab (or pool) registered, and the peer."""
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(
        end.role, nixl_agent_config(enable_prog_thread=False, num_threads=threads)
    )
    memory = end.pool if pool else end.stage
    agent.register_memory([(memory.data_ptr(), memory.numel(), 0, "")], MEMORY)
    end.tell(agent.get_agent_metadata(), memory.data_ptr())
    metadata, there = end.hear()
    name = agent.add_remote_agent(metadata)
    name = name.decode() if isinstance(name, bytes) else name
    return agent, name, memory.data_ptr(), there


def listed(agent, name, base, piece_bytes, pieces):
    rows = [(base + i * piece_bytes, piece_bytes, 0) for i in range(pieces)]
    return agent.prep_xfer_dlist(name, agent.get_xfer_descs(rows, MEMORY))


class Notes:
    """What the peer's writes said when they ended, each once."""

    def __init__(self, agent):
        self.agent, self.came = agent, []

    def next(self):
        until = time.monotonic() + LIMIT_S
        while not self.came:
            for notes in self.agent.get_new_notifs().values():
                self.came += notes
            if time.monotonic() > until:
                raise TimeoutError("a notification never came")
        return self.came.pop(0)


def wrote(agent, handle):
    until = time.monotonic() + LIMIT_S
    while agent.check_xfer_state(handle) == "PROC":
        if time.monotonic() > until:
            raise TimeoutError("a write never ended")
    agent.release_xfer_handle(handle)


def staged(end, moves, pieces):
    """Gather, write, scatter, in *pieces* of whole layers that overlap."""
    gather, scatter = moves(end)
    agent, name, here, there = agents(end)
    notes, part = Notes(agent), LAYERS // pieces
    size = BYTES // pieces
    local = listed(agent, "NIXL_INIT_AGENT", here, size, pieces)
    remote = listed(agent, name, there, size, pieces)
    for _ in range(ROUNDS + WARM_UP):
        if end.role == "source":
            end.hear()
            begun = time.monotonic()
            events = []
            for i in range(pieces):
                gather(i * part, (i + 1) * part)
                events.append(end.mark())
            handles = []
            for i, event in enumerate(events):
                event()
                handle = agent.make_prepped_xfer(
                    "WRITE", local, [i], remote, [i], str(i).encode()
                )
                agent.transfer(handle)
                handles.append(handle)
            for handle in handles:
                wrote(agent, handle)
            end.tell(begun)
        else:
            end.tell("ready")
            for _ in range(pieces):
                i = int(notes.next())  # writes may end in any order
                scatter(i * part, (i + 1) * part)
            end.sync()
            ended = time.monotonic()
            (begun,) = end.hear()
            end.result(ended - begun, end.right())


def mapped(end):
    """Map the source's pool with CUDA IPC and copy between pools in one kernel."""
    from torch.multiprocessing.reductions import reduce_tensor

    if end.role == "source":
        end.tell(*reduce_tensor(end.pool))
        for _ in range(ROUNDS + WARM_UP):
            end.hear()
            end.tell(time.monotonic())
        end.hear()
        return
    rebuild, arguments = end.hear()
    theirs = rebuild(*arguments)
    torch = end.torch
    source = torch.tensor(end.source, device=DEVICE)
    view, here = theirs.view(torch.int64), end.pool.view(torch.int64)
    for _ in range(ROUNDS + WARM_UP):
        end.tell("ready")
        (begun,) = end.hear()
        copy_mapped(torch, view, here, source, end.index)
        end.sync()
        end.result(time.monotonic() - begun, end.right())
    end.tell("end")


def pushed(end, checked):
    """Gather into the target's slab, mapped by CUDA IPC, and scatter: no NIXL.

    What two processes of one GPU need at least if one pushes to the other: a
    kernel each, and a flag in shared memory that both watch.
    """
    from multiprocessing.shared_memory import SharedMemory

    import numpy
    from torch.multiprocessing.reductions import reduce_tensor

    slots = numpy.arange(PER_LAYER)
    if end.role == "target":
        shared = SharedMemory(create=True, size=8 + 8 * BLOCKS)
        made = stage(end)  # before the other end writes into the slab
        end.tell(shared.name, *reduce_tensor(end.stage))
    else:
        name, rebuild, arguments = end.hear()
        shared = SharedMemory(name)
        end.stage = rebuild(*arguments)
        made = stage(end)
    flag = numpy.ndarray(1, numpy.int64, shared.buf)
    sums = numpy.ndarray(BLOCKS, numpy.uint64, shared.buf, offset=8)
    flag[0] = 0
    for i in range(1, ROUNDS + WARM_UP + 1):
        if end.role == "source":
            end.hear()
            time.sleep(2e-3)
            begun = time.monotonic()
            made.move(end.index, 0, slice(None), gather=True)
            end.mark()()
            if checked:
                sums[:] = made.gathered(0, LAYERS, slots)
            flag[0] = i
            end.tell(begun)
        else:
            end.tell("ready")
            until = time.monotonic() + LIMIT_S
            while flag[0] < i and time.monotonic() < until:
                pass
            found = made.sums(0, LAYERS, slots) if checked else sums
            made.move(end.index, 0, slice(None), gather=False)
            end.sync()
            same = bool((found == sums).all())
            at = time.monotonic()
            (begun,) = end.hear()
            end.result(at - begun, same and end.right())
    # The views must go before what they look at.
    del flag, sums
    if end.role == "source":
        end.hear()
    else:
        end.tell("end")
        shared.unlink()


def copy_mapped(torch, view, here, source, index):
    try:
        kernel = _copy()
    except ImportError:
        for layer in range(LAYERS):
            here[layer].index_copy_(0, index, view[layer].index_select(0, source))
        return
    words = BLOCK_BYTES // 8
    grid = (words // 2048, PER_LAYER, LAYERS)
    kernel[grid](view, here, source, index, words, view.stride(0), size=2048)


def _copy(made=[]):  # noqa: B006, compiled once
    if not made:
        import _llmd_copy_kernel

        made.append(_llmd_copy_kernel.copy)
    return made[0]


KERNEL = """
import triton
import triton.language as tl

@triton.jit
def copy(view, here, source, index, words, stride, size: tl.constexpr):
    at = tl.program_id(0) * size + tl.arange(0, size)
    block, layer = tl.program_id(1), tl.program_id(2)
    come = tl.load(source + block) * words
    go = tl.load(index + block) * words
    offset = layer.to(tl.int64) * stride
    tl.store(here + offset + go + at, tl.load(view + offset + come + at))
"""


def runs(end, run, threads):
    """Write runs of adjacent blocks straight from pool to pool."""
    agent, name, here, there = agents(end, threads, pool=True)
    size, count = run * BLOCK_BYTES, 2 * BLOCKS // run
    local = listed(agent, "NIXL_INIT_AGENT", here, size, count)
    remote = listed(agent, name, there, size, count)
    notes, order = Notes(agent), random.Random(5)
    source = order.sample(range(count), BLOCKS // run)
    target = order.sample(range(count), BLOCKS // run)
    for _ in range(ROUNDS + WARM_UP):
        if end.role == "source":
            end.hear()
            begun = time.monotonic()
            handle = agent.make_prepped_xfer(
                "WRITE", local, source, remote, target, b"x"
            )
            agent.transfer(handle)
            wrote(agent, handle)
            end.tell(begun)
            pool = end.pool.view(-1, size)
            sums = pool[source].to(end.torch.int64).sum().item()
            end.tell(sums)
        else:
            end.tell("ready")
            notes.next()
            ended = time.monotonic()
            (begun,) = end.hear()
            pool = end.pool.view(-1, size)
            same = pool[target].to(end.torch.int64).sum().item() == end.hear()[0]
            end.pool.zero_()
            end.sync()
            end.result(ended - begun, same)


def staging(end):
    """Return gather(), scatter() and the checksums of what is there and was sent."""
    if DEVICE != "cuda":
        from llmd.adapters.nixl.blocks import xxh3

        def sums(first, last, slots):
            return xxh3(end.stage[first:last].numpy(), slots)

        return *torch_moves(end), sums, None
    made = stage(end)
    return (
        lambda: made.move(end.index, 0, slice(None), gather=True),
        lambda: made.move(end.index, 0, slice(None), gather=False),
        made.sums,
        made.gathered,
    )


def through_host(end):
    """Stage in host memory that the other process maps, as across MIG instances."""
    from llmd.adapters.nixl import SharedMemory

    shared = SharedMemory(BYTES)
    end.stage = end.torch.from_numpy(shared.array).view(end.stage.shape)
    if DEVICE == "cuda":
        from llmd.adapters.nixl.kernels import pin

        pin(end.stage)
    return shared


def llmd(end, checksums, piece_bytes, host=False, copiers=1):
    """The transport of llmd itself, staged on both sides as the connector does."""
    from llmd.adapters.nixl import NixlTransport, Slab
    from llmd.transport import Layout, Settings

    shared = through_host(end) if host else None
    gather, scatter, sums, gathered = staging(end)
    layout = Layout(
        model="none",
        dtype="u8",
        layers=LAYERS,
        block_tokens=1,
        block_bytes=BLOCK_BYTES,
    )
    slab = Slab(
        layout=layout,
        blocks=PER_LAYER,
        bases=tuple([layer.data_ptr() for layer in end.stage]),
        memory="DRAM" if host else MEMORY,
        sums=sums,
        gathered=gathered,
        enter=lambda: DEVICE != "cuda" or end.torch.cuda.set_device(0),
        owner=end.stage,
        shared=shared,
    )
    woken = threading.Event()
    mine = NixlTransport(
        slab,
        KEY,
        checksums=checksums,
        settings=Settings(piece_bytes=piece_bytes, writes_in_flight=8, copiers=copiers),
        wake=woken.set,
    )
    with mine:
        if end.role == "source":
            give(end, mine, gather)
        else:
            get(end, mine, scatter, woken)


def give(end, mine, gather):
    """Gather and offer, once a round."""
    from llmd.transport import Offer, TransferId

    end.tell(mine.address())
    for i in range(ROUNDS + WARM_UP):
        end.hear()
        time.sleep(2e-3)
        begun = time.monotonic()
        gather()
        end.mark()()
        mine.offer(Offer(id=TransferId(f"r{i}", 1000 + i), blocks=range(PER_LAYER)))
        end.tell(begun)
        mine.poll()
    end.hear()
    end.note = str(mine.path)


def get(end, mine, scatter, woken):
    """Fetch and scatter, once a round."""
    from llmd.transport import Fetch, TransferEnded, TransferId

    (address,) = end.hear()
    peer, slots = mine.connect(address), range(PER_LAYER)
    for i in range(ROUNDS + WARM_UP):
        id = TransferId(f"r{i}", 1000 + i)
        mine.fetch(Fetch(id=id, peer=peer, blocks=slots, early=True))
        end.tell("ready")
        ended, until = None, time.monotonic() + LIMIT_S
        while ended is None and time.monotonic() < until:
            woken.wait(0.5)
            woken.clear()
            for report in mine.poll():
                if isinstance(report, TransferEnded) and report.id == id:
                    ended = report
        if ended is None or ended.error:
            raise RuntimeError(f"{ended} {dict(mine.counts)}")
        scatter()
        end.sync()
        at = time.monotonic()
        (begun,) = end.hear()
        end.result(at - begun, end.right())
    time.sleep(0.5)  # until UCX's log tells the way
    end.tell("end")


VARIANTS = {
    "llmd, checked": lambda end: llmd(end, True, 1 << 26),
    "llmd, unchecked": lambda end: llmd(end, False, 1 << 26),
    "llmd, checked, 16 MiB pieces": lambda end: llmd(end, True, 1 << 24),
    "llmd, checked, 128 MiB pieces": lambda end: llmd(end, True, 1 << 27),
    "llmd, checked, 256 MiB pieces": lambda end: llmd(end, True, 1 << 28),
    "llmd, unchecked, 256 MiB pieces": lambda end: llmd(end, False, 1 << 28),
    **{
        f"llmd, checked, through host memory, {copiers} copiers": (
            lambda end, copiers=copiers: llmd(end, True, 1 << 25, True, copiers)
        )
        for copiers in (1, 2, 4, 8)
    },
    "llmd, unchecked, through host memory, 8 copiers": (
        lambda end: llmd(end, False, 1 << 25, True, 8)
    ),
    "staged, kernel, 1 piece": lambda end: staged(end, kernels, 1),
    "staged, kernel, 4 pieces": lambda end: staged(end, kernels, 4),
    "staged, kernel, 16 pieces": lambda end: staged(end, kernels, 16),
    "staged, torch, 1 piece": lambda end: staged(end, torch_moves, 1),
    "mapped by CUDA IPC, one kernel": mapped,
    "pushed into a mapped slab, checked": lambda end: pushed(end, True),
    "pushed into a mapped slab, unchecked": lambda end: pushed(end, False),
    "runs of 1, 4 threads": lambda end: runs(end, 1, 4),
    "runs of 16, 4 threads": lambda end: runs(end, 16, 4),
    "runs of 64, no threads": lambda end: runs(end, 64, 0),
}


def serve(role, variant, pipe, answers, visible):
    if visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    os.environ.setdefault("UCX_PROTO_INFO", "y")
    os.environ.setdefault("UCX_LOG_FILE", f"/tmp/llmd-ucx-{os.getpid()}.log")
    end = None
    try:
        end = End(role, pipe)
        end.note = ""
        end.seconds, end.wrong = [], 0

        def result(seconds, same):
            end.seconds.append(seconds)
            end.wrong += not same

        end.result = result
        VARIANTS[variant](end)
        answers.send((role, end.seconds, end.wrong, end.note or lanes()))
    except BaseException:
        answers.send((role, traceback.format_exc()[-1500:]))
    # Pipes and mapped memory must outlive the other side's last look at them.
    time.sleep(0.3)
    os._exit(0)


def lanes():
    """Return how UCX wrote to the other process's GPU memory, from its log."""
    try:
        with open(os.environ["UCX_LOG_FILE"]) as log:
            text = log.read().splitlines()
    except OSError:
        return ""
    found, writing = [], False
    for line in text:
        if "ucp_put" in line or "ucp_get" in line or "active message" in line:
            writing = "ucp_put" in line
        if writing and "inf" in line:
            found.append(line.rsplit("|", 2)[-2].strip())
    return "; ".join(dict.fromkeys(found))


def measure(variant, visible):
    """Run a variant in a pair of processes and return its row."""
    context = mp.get_context("spawn")
    one, other = context.Pipe()
    pairs = []
    for role, pipe, sees in zip(
        ("source", "target"), (one, other), visible, strict=True
    ):
        mine, theirs = context.Pipe(duplex=False)
        what = (role, variant, pipe, theirs, sees)
        process = context.Process(target=serve, args=what)
        process.start()
        pairs.append((process, mine))
    row = {"variant": variant}
    until = time.monotonic() + LIMIT_S
    try:
        for _, mine in pairs:
            if not mine.poll(max(0.1, until - time.monotonic())):
                row["error"] = row.get("error") or "it took too long"
                continue
            answer = mine.recv()
            if len(answer) == 2:
                row["error"] = f"{answer[0]}: {answer[1]}"
            elif answer[0] == "source":
                row["path"] = answer[3]
            else:
                row |= figures(answer[1][WARM_UP:], answer[1][:1], answer[2])
    finally:
        for process, _ in pairs:
            process.join(2)
            if process.is_alive():
                process.kill()
    return row


def figures(seconds, first, wrong):
    return {
        "gb_per_s": BYTES / 1e9 / statistics.median(seconds),
        "best_gb_per_s": BYTES / 1e9 / min(seconds),
        "median_ms": 1e3 * statistics.median(seconds),
        "first_ms": 1e3 * first[0],
        "wrong_rounds": wrong,
    }


def machine():
    about = {"python": sys.version.split()[0]}
    try:
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version",
            "--format=csv,noheader",
        ]
        about["gpu"] = subprocess.run(
            query, capture_output=True, text=True, timeout=10, check=False
        ).stdout.strip()
    except OSError:
        pass
    for name in ("torch", "nixl", "triton"):
        try:
            from importlib.metadata import version

            about[name] = version(name)
        except Exception:
            about[name] = "?"
    return about


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--limit-s", type=float, default=165.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--visible", nargs=2, default=("", ""), metavar="GPUS")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args()
    until = time.monotonic() + options.limit_s
    # The kernel of one variant lives in a file, as triton reads its source.
    folder = os.path.join("/tmp", f"llmd-kernel-{os.getpid()}")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "_llmd_copy_kernel.py"), "w") as file:
        file.write(KERNEL)
    source = os.path.join(os.path.dirname(__file__), "..", "..", "src")
    paths = [folder, os.path.abspath(source), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    rows = []
    for variant in VARIANTS:
        if options.only and options.only not in variant:
            continue
        if time.monotonic() > until:
            rows.append({"variant": variant, "error": "no time left"})
            continue
        rows.append(measure(variant, options.visible))
        print(json.dumps(rows[-1]), flush=True)
    about = machine() | {"visible": options.visible}
    result = {"bytes": BYTES, "blocks": BLOCKS, "machine": about, "rows": rows}
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
