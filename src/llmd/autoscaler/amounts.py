"""Numbers that make sense, for whatever decides or follows a count."""

from __future__ import annotations

import math

from ..amounts import a_number, as_real
from ..errors import InvalidPolicy


def is_number(value: object) -> bool:
    """Say whether *value* is a number, and no NaN.

    >>> is_number(1.5), is_number(float("nan")), is_number(True), is_number("1")
    (True, False, False, False)
    """
    return not math.isnan(as_real(value))


def is_whole(value: object) -> bool:
    """Say whether *value* is a whole number, as counts are."""
    return isinstance(value, int) and not isinstance(value, bool)


positive = a_number(above=True, endless=True, error=InvalidPolicy)
seconds = a_number(endless=True, error=InvalidPolicy)
