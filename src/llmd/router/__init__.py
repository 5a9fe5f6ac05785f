"""Which worker: the `Router` interface and its policies."""

from .blend import Blend, KVHeadroom, PrefixOverlap, QueueDepth, Score
from .disaggregated import Disaggregated, UniformLink
from .interface import Router, TermRouter
from .seconds import EarliestFirstToken
from .simple import (
    LeastLoaded,
    LeastWork,
    PowerOfTwo,
    Random,
    RoundRobin,
    SessionAffinity,
)

__all__ = [
    "Blend",
    "Disaggregated",
    "EarliestFirstToken",
    "KVHeadroom",
    "LeastLoaded",
    "LeastWork",
    "PowerOfTwo",
    "PrefixOverlap",
    "QueueDepth",
    "Random",
    "RoundRobin",
    "Router",
    "Score",
    "SessionAffinity",
    "TermRouter",
    "UniformLink",
]
