from .calibrate import calibrate_host, calibrate_link
from .detect import Answers, Detected, detect
from .economics import break_even_tokens, fetch_gain_s, tier_credit
from .fit import Errors, Step, errors, fit_from_probe
from .hardware import (
    A100,
    GH200_96,
    GH200_144,
    GH200_NVL2,
    H100,
    H200,
    L40S,
    PROFILES,
    Hardware,
    Link,
    this_cpu,
)
from .machine import Efficiency, Machine, merged_context
from .shape import Shape
from .switching import COPIED, MIRRORED, VLLM_SLEEP, Switching, saves_kv

__all__ = [
    "A100",
    "COPIED",
    "GH200_96",
    "GH200_144",
    "GH200_NVL2",
    "H100",
    "H200",
    "L40S",
    "MIRRORED",
    "PROFILES",
    "VLLM_SLEEP",
    "Answers",
    "Detected",
    "Efficiency",
    "Errors",
    "Hardware",
    "Link",
    "Machine",
    "Shape",
    "Step",
    "Switching",
    "break_even_tokens",
    "calibrate_host",
    "calibrate_link",
    "detect",
    "errors",
    "fetch_gain_s",
    "fit_from_probe",
    "merged_context",
    "saves_kv",
    "this_cpu",
    "tier_credit",
]
