"""The compiled inner loops of an arrival, where there are any.

`loops.c` is built with the package if a compiler is at hand.  Without it, or
with LLMD_PURE=1 in the environment, `loops` is None and the twins in Python
serve: the same results, several times slower.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

__all__ = ["loops"]


def _built() -> ModuleType | None:
    if os.environ.get("LLMD_PURE", "") not in ("", "0"):
        return None
    try:
        return importlib.import_module(f"{__name__}._loops")
    except ImportError:  # installed without a compiler
        return None


loops = _built()
