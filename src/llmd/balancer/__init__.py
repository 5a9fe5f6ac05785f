"""Who goes next, and who may enter: `QueueBalancer` and its policies."""

from .interface import Listener, Place, QueueBalancer
from .orders import Fcfs
from .verdict import ADMIT, Check, Verdict

__all__ = [
    "ADMIT",
    "Check",
    "Fcfs",
    "Listener",
    "Place",
    "QueueBalancer",
    "Verdict",
]
