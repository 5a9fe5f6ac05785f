from .arbiter import GpuArbiter
from .interface import GpuView, Infeasible, Slot, TimeSlice, Turn
from .messages import (
    Action,
    Asked,
    Blame,
    Complain,
    Do,
    Done,
    Failed,
    GpuCommand,
    GpuEvent,
    Joined,
    Left,
    Lost,
    Sharer,
    TurnTaken,
    Wanted,
)
from .quantum import Quantum, choose_quantum, quantum_cap, quantum_for_overhead
from .scheduler import QuantumScheduler
from .simple import FairShare, FifoLock

__all__ = [
    "Action",
    "Asked",
    "Blame",
    "Complain",
    "Do",
    "Done",
    "Failed",
    "FairShare",
    "FifoLock",
    "GpuArbiter",
    "GpuCommand",
    "GpuEvent",
    "GpuView",
    "Infeasible",
    "Joined",
    "Left",
    "Lost",
    "Quantum",
    "QuantumScheduler",
    "Sharer",
    "Slot",
    "TimeSlice",
    "Turn",
    "TurnTaken",
    "Wanted",
    "choose_quantum",
    "quantum_cap",
    "quantum_for_overhead",
]
