"""Numbers that make sense, for whatever decides or follows a count."""

from __future__ import annotations

import math
import numbers
from typing import Any

from ..errors import InvalidPolicy, shown


def is_number(value: object) -> bool:
    """Say whether *value* is a number, and no NaN.

    >>> is_number(1.5), is_number(float("nan")), is_number(True), is_number("1")
    (True, False, False, False)
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and not math.isnan(value)  # type: ignore[arg-type]


def is_whole(value: object) -> bool:
    """Say whether *value* is a whole number, as counts are."""
    return isinstance(value, int) and not isinstance(value, bool)


def positive(instance: object, attribute: Any, value: float) -> None:
    """Refuse what is no number over 0, as a validator.

    Raises:
        InvalidPolicy: So it is.
    """
    if not (is_number(value) and value > 0):
        where = f"{type(instance).__name__}.{attribute.name}"
        raise InvalidPolicy(f"{where} is {shown(value)}, must be a number over 0")


def seconds(instance: object, attribute: Any, value: float) -> None:
    """Refuse what is no time to wait, as a validator; none, and for ever, are.

    Raises:
        InvalidPolicy: So it is.
    """
    if not (is_number(value) and value >= 0):
        where = f"{type(instance).__name__}.{attribute.name}"
        raise InvalidPolicy(f"{where} is {shown(value)}, must be seconds")
