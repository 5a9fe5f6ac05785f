"""Which way UCX sends bytes, read from its own log.

`UCX_PROTO_INFO` makes UCX print a table for each kind of operation between two
ends, with the protocol of each range of sizes.  Its title is two lines or one
with two cells, whichever is narrower:

    | agent intra-node cfg#1                                   |
    | remote memory write by ucp_put* from host memory to host |
    | 0..inf | zero-copy   | cma/memory                        |

    | agent intra-node cfg#1 | remote memory write by ucp_put*(multi) from ... |
    |                 0..inf | zero-copy      | cuda_ipc/cuda                 |
"""

from __future__ import annotations

import os
import re
import tempfile
import uuid
from multiprocessing.util import Finalize
from pathlib import Path as File

import attrs

_LINE = re.compile(r"\[[^\]]*:(\d+) *:\d+\]\s*\|(.*)\|\s*$")
_ENDPOINT = re.compile(r"(self|intra-node|inter-node) cfg#\d+$")
_OURS = "llmd-ucx-"
_SLOW = re.compile(r"\btcp/")


@attrs.frozen
class Path:
    """One way that bytes go, in UCX's words.

    Attributes:
        operation: In UCX's words, for example "remote memory write by ucp_put*".
        sizes: Bytes it is for.
        protocol: How, for example "zero-copy".
        lanes: Over what, for example "cma/memory" or "cuda_ipc/cuda".
        between: "intra-node", "inter-node", or "self" for an agent's own loop.

    >>> Path("remote memory write", "0..inf", "zero-copy", "tcp/lo").slow
    True
    """

    operation: str
    sizes: str
    protocol: str
    lanes: str
    between: str = ""

    @property
    def slow(self) -> bool:
        """It goes through the kernel's network stack."""
        return _SLOW.search(self.lanes) is not None

    @property
    def writes(self) -> bool:
        """It is how a peer's memory is written."""
        return self.operation.startswith("remote memory write")


COPIED = Path(
    operation="remote memory write by the source's own copy",
    sizes="0..inf",
    protocol="one copy",
    lanes="mapped/memory",
    between="intra-node",
)
"""Not UCX's: blocks go to a slab that the source maps, see `SharedMemory`."""


@attrs.define(eq=False)
class PathLog:
    """A log that UCX writes its choices to, of all agents of this process.

    UCX reads its environment once, when its first context is made, so this
    must be made before the first NIXL agent of the process.  Two processes that
    log to one file overwrite each other, so its children, which inherit the
    environment, log to files of their own.

    Attributes:
        file: The log; `%p` stands for the process id.
    """

    file: File

    @classmethod
    def begin(cls) -> PathLog | None:
        """Let UCX log its choices; None if the user logs elsewhere already."""
        if "UCX_LOG_FILE" in os.environ:
            file = File(os.environ["UCX_LOG_FILE"])
            if os.environ.get("UCX_PROTO_INFO") != "y":
                return None
        else:
            name = f"{_OURS}{uuid.uuid4().hex}-%p.log"
            file = File(tempfile.gettempdir()) / name
            os.environ["UCX_LOG_FILE"] = str(file)
            os.environ.setdefault("UCX_PROTO_INFO", "y")
        log = cls(file)
        if file.name.startswith(_OURS):
            # Of `multiprocessing`, since its children run no other at their end.
            Finalize(None, log.own.unlink, (True,), exitpriority=0)
        return log

    @property
    def own(self) -> File:
        """The log of this process."""
        return File(str(self.file).replace("%p", str(os.getpid())))

    def paths(self) -> list[Path]:
        """Return what was chosen so far, oldest first."""
        try:
            return parse(self.own.read_text(errors="replace"), os.getpid())
        except OSError:
            return []

    def write_path(self, memory: str) -> Path | None:
        """Return how large blocks of *memory*, DRAM or VRAM, are written.

        To the peer met last.  UCX lists every kind of memory it could be asked
        to write from, so a GPU's slab has a table for host memory too.
        """
        origin = "from cuda" if memory == "VRAM" else "from host"
        ours = [
            path
            for path in self.paths()
            if path.writes
            and path.between != "self"
            and path.sizes.endswith("inf")
            and origin in path.operation
        ]
        return ours[-1] if ours else None


def parse(log: str, process: int) -> list[Path]:
    """Read the tables that *process* wrote to *log*.

    >>> parse('''
    ... [1.0] [host:7:0] | agent intra-node cfg#1                    |
    ... [1.0] [host:7:0] | remote memory write by ucp_put* from host |
    ... [1.0] [host:7:0] |  Range   |  Description  |  Config        |
    ... [1.0] [host:7:0] |  0..inf  |  zero-copy    |  cma/memory    |
    ... ''', 7)[0].lanes
    'cma/memory'
    """
    found, between, operation = [], "", ""
    for line in log.splitlines():
        match = _LINE.search(line)
        if match is None or int(match[1]) != process:
            continue
        cells = [cell.strip() for cell in match[2].split("|")]
        if len(cells) < 3:
            for cell in cells:
                endpoint = _ENDPOINT.search(cell)
                if endpoint is None:
                    operation = cell
                else:
                    between = endpoint[1]
        elif len(cells) == 3 and cells[0] != "Range":
            sizes, protocol, lanes = cells
            found.append(Path(operation, sizes, protocol, lanes, between))
    return found


def why_slow(
    memory: str, *, same_host: bool = True, vmm: bool = False, mig: bool = False
) -> str:
    """Say what is likely to have made UCX fall back to TCP.

    The causes are those of nixl#1754 (VMM memory), nixl PR#2208 (READ without
    NVLink), and CUDA's own limits on IPC.
    """
    tls = os.environ.get("UCX_TLS", "")
    if tls and not any(name in tls for name in ("all", "cma", "sm", "rc", "cuda_ipc")):
        return f"UCX_TLS={tls} leaves it no other way"
    if not same_host:
        return "the peer is on another host and no RDMA device was found"
    if memory == "DRAM":
        return (
            "cross-memory attach is not permitted: processes in different user or"
            " PID namespaces, or ptrace_scope forbids it"
        )
    if mig:
        return "CUDA IPC does not cross MIG instances"
    if vmm:
        return "the memory is mapped by VMM (expandable segments); use cudaMalloc"
    return "CUDA IPC is not permitted: separate IPC namespaces, or VMM memory"
