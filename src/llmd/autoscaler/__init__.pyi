from .behavior import Behavior, Count, Percent, Rules, Select
from .cheapest import Cheapest, Offer
from .followers import (
    Consolidation,
    Crowded,
    Largest,
    TargetConcurrency,
    TargetKV,
    TargetMetric,
    TargetQueue,
    TargetUtilisation,
    TargetWait,
)
from .forecast import Forecast, HoltWinters
from .interface import Autoscaler
from .kpa import Kpa
from .pools import Pool, Pools
from .quantile import Quantile
from .slo import LatencySlo, Load
from .tokens import TokenSupply

__all__ = [
    "Autoscaler",
    "Behavior",
    "Cheapest",
    "Consolidation",
    "Count",
    "Crowded",
    "Forecast",
    "HoltWinters",
    "Kpa",
    "Largest",
    "LatencySlo",
    "Load",
    "Offer",
    "Percent",
    "Pool",
    "Pools",
    "Quantile",
    "Rules",
    "Select",
    "TargetConcurrency",
    "TargetKV",
    "TargetMetric",
    "TargetQueue",
    "TargetUtilisation",
    "TargetWait",
    "TokenSupply",
]
