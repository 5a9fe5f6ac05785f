"""The HorizontalPodAutoscaler of Kubernetes, v2, with no Kubernetes needed."""

from .calculator import Tolerance
from .controller import History, HpaSpec
from .metrics import (
    AverageValue,
    External,
    Metric,
    Object,
    Pods,
    Resource,
    Utilization,
    Value,
)
from .pods import Phase, Pod, Sample, Scene
from .policy import SIGNALS, Hpa
from .quantity import exact, milli

__all__ = [
    "SIGNALS",
    "AverageValue",
    "External",
    "History",
    "Hpa",
    "HpaSpec",
    "Metric",
    "Object",
    "Phase",
    "Pod",
    "Pods",
    "Resource",
    "Sample",
    "Scene",
    "Tolerance",
    "Utilization",
    "Value",
    "exact",
    "milli",
]
