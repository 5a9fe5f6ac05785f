"""KV transfer over NIXL (UCX: shared memory, RDMA, NVLink, TCP).

Needs the extra `nixl`.
"""

from .path import Path, PathLog
from .shared import SharedMemory
from .slab import Slab
from .transport import NixlTransport

__all__ = ["NixlTransport", "Path", "PathLog", "SharedMemory", "Slab"]
