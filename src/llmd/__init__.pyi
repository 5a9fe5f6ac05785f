from . import commands, errors, events
from .autoscaler import Autoscaler, TargetConcurrency
from .balancer import ADMIT, Fcfs, QueueBalancer, Verdict
from .blocks import Prompt
from .cluster import Cluster
from .decision import Decision, Explanation, Term
from .errors import LlmdError
from .hashing import Hasher
from .index import BlendedIndex, ExactIndex, GuessedIndex, PrefixIndex
from .machines import Machine
from .router import (
    Blend,
    Disaggregated,
    EarliestFirstToken,
    KVHeadroom,
    LeastDelay,
    LeastLoaded,
    LeastWork,
    PowerOfTwo,
    PrefixOverlap,
    QueueDepth,
    Random,
    RoundRobin,
    Router,
    Score,
    SessionAffinity,
    TermRouter,
    UniformLink,
)
from .timeslice import QuantumScheduler, TimeSlice
from .transport import KVTransport
from .types import Request, RequestId, Role, Signals, State, Tier, Worker, WorkerId
from .view import View, Workers

__version__: str

__all__ = [
    "ADMIT",
    "Autoscaler",
    "Blend",
    "BlendedIndex",
    "Cluster",
    "Decision",
    "Disaggregated",
    "EarliestFirstToken",
    "ExactIndex",
    "Explanation",
    "Fcfs",
    "GuessedIndex",
    "Hasher",
    "KVHeadroom",
    "KVTransport",
    "LeastDelay",
    "LeastLoaded",
    "LeastWork",
    "LlmdError",
    "Machine",
    "PowerOfTwo",
    "PrefixIndex",
    "PrefixOverlap",
    "Prompt",
    "QuantumScheduler",
    "QueueBalancer",
    "QueueDepth",
    "Random",
    "Request",
    "RequestId",
    "Role",
    "RoundRobin",
    "Router",
    "Score",
    "SessionAffinity",
    "Signals",
    "State",
    "TargetConcurrency",
    "Term",
    "TermRouter",
    "Tier",
    "TimeSlice",
    "UniformLink",
    "Verdict",
    "View",
    "Worker",
    "WorkerId",
    "Workers",
    "commands",
    "errors",
    "events",
]
