from .blend import Blend, KVHeadroom, PrefixOverlap, QueueDepth, Score
from .breaker import CircuitBreaker
from .chance import Explore, Softmax
from .delay import LeastDelay
from .disaggregated import Disaggregated, UniformLink
from .gates import KVBarrier, LoadGate, SpreadCold, Stale, Surcharge
from .interface import Around, Router, TermRouter
from .seconds import EarliestFirstToken
from .shadow import Agreement, Shadow
from .simple import (
    LeastLoaded,
    LeastWork,
    PowerOfTwo,
    Random,
    RoundRobin,
    SessionAffinity,
)

__all__ = [
    "Agreement",
    "Around",
    "Blend",
    "CircuitBreaker",
    "Disaggregated",
    "EarliestFirstToken",
    "Explore",
    "KVBarrier",
    "KVHeadroom",
    "LeastDelay",
    "LeastLoaded",
    "LeastWork",
    "LoadGate",
    "PowerOfTwo",
    "PrefixOverlap",
    "QueueDepth",
    "Random",
    "RoundRobin",
    "Router",
    "Score",
    "SessionAffinity",
    "Shadow",
    "Softmax",
    "SpreadCold",
    "Stale",
    "Surcharge",
    "TermRouter",
    "UniformLink",
]
