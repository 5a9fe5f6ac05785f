from .accounts import Account, Accounts, Waits, jain
from .band import Band
from .bands import Bands
from .control import FlowControl
from .fair import Drr, Fair, FairRoundRobin, Las, Vtc
from .gates import DeadlineInfeasible, Gate, QueueFull, RateLimit, Saturation
from .interface import Listener, Place, QueueBalancer
from .ledger import Ledger
from .locality import D2lpm, Dlpm
from .orders import Edf, Fcfs, ShortestPrefill, SloDeadline, WeightedShortest
from .over import Over
from .rooms import AimdRoom, FixedRoom, LongPrefillCap, PromptBudget, Room
from .slowstart import SlowStart
from .verdict import ADMIT, Check, Verdict

__all__ = [
    "ADMIT",
    "Account",
    "Accounts",
    "AimdRoom",
    "Band",
    "Bands",
    "Check",
    "D2lpm",
    "DeadlineInfeasible",
    "Dlpm",
    "Drr",
    "Edf",
    "Fair",
    "FairRoundRobin",
    "Fcfs",
    "FixedRoom",
    "FlowControl",
    "Gate",
    "Las",
    "Ledger",
    "Listener",
    "LongPrefillCap",
    "Over",
    "Place",
    "PromptBudget",
    "QueueBalancer",
    "QueueFull",
    "RateLimit",
    "Room",
    "Saturation",
    "ShortestPrefill",
    "SloDeadline",
    "SlowStart",
    "Verdict",
    "Vtc",
    "Waits",
    "WeightedShortest",
    "jain",
]
