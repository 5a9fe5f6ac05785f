"""Amounts that make sense, for whatever a time slice is set up with."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable
from typing import Any

from ..errors import InvalidSlice, shown

SHORTEST_TURN_S = 1e-6
"""A turn is asked for again no sooner: what rounding leaves of one is less."""


def amount(
    least: float = 0.0, *, endless: bool = False
) -> Callable[[Any, Any, Any], None]:
    """Return a validator: a number of at least *least*, finite unless *endless*.

    It refuses a NaN, and whole numbers too large for a float, by `InvalidSlice`.

    >>> import math
    >>> from llmd.timeslice import FairShare
    >>> FairShare(quantum_s=math.nan)
    Traceback (most recent call last):
    ...
    llmd.errors.InvalidSlice: FairShare.quantum_s is nan, want a finite number >= 1e-06
    """
    most = math.inf if endless else sys.float_info.max

    def check(instance: object, field: Any, value: Any) -> None:
        real: Any = value if isinstance(value, numbers.Real) else math.nan
        if not least <= real <= most:
            where = f"{type(instance).__name__}.{field.name}"
            kind = "number" if endless else "finite number"
            raise InvalidSlice(f"{where} is {shown(value)}, want a {kind} >= {least:g}")

    return check
