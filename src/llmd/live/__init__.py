"""A driver in real time on asyncio: the same cluster, real engines."""

from .engine import Call, Engine, Output, Promise, Report
from .lease import Lease
from .pool import EnginePool
from .server import Server
from .session import Sessions
from .sliceable import Sleeper, Sliceable
from .timeslice import SharedEngine, SharedGpu

__all__ = [
    "Call",
    "Engine",
    "EnginePool",
    "Lease",
    "Output",
    "Promise",
    "Report",
    "Server",
    "Sessions",
    "SharedEngine",
    "SharedGpu",
    "Sleeper",
    "Sliceable",
]
