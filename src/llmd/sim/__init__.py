"""A driver in virtual time: the same cluster, modelled workers.

>>> from llmd import EarliestFirstToken
>>> from llmd.sim import simulate, workloads
>>> report = simulate(EarliestFirstToken(), workloads.dialogue(requests=100))
>>> report.completed
100
"""

from . import plots, traces, workloads
from .bootstrap import Interval
from .calibration import Calibration
from .capacity import Capacity, capacities, capacity
from .face import fleet, simulate
from .faults import Crash
from .load import WorkerLoad
from .report import Report, Slo
from .rollout import Rollout
from .sequence import EngineSettings
from .shares import Share, Shares, shares
from .simulator import Simulator
from .study import Comparison, compare
from .worker import ModelWorker
from .workload import Job, Workload

__all__ = [
    "Calibration",
    "Capacity",
    "Comparison",
    "Crash",
    "EngineSettings",
    "Interval",
    "Job",
    "ModelWorker",
    "Report",
    "Rollout",
    "Share",
    "Shares",
    "Simulator",
    "Slo",
    "WorkerLoad",
    "Workload",
    "capacities",
    "capacity",
    "compare",
    "fleet",
    "plots",
    "shares",
    "simulate",
    "traces",
    "workloads",
]
