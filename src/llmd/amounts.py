"""Parameters that make sense: validators that refuse the rest by name."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

from .errors import LlmdError, PolicyError, shown


def a_number(
    least: float = 0.0,
    *,
    above: bool = False,
    most: float = math.inf,
    endless: bool = False,
    whole: bool = False,
    error: type[LlmdError] = PolicyError,
) -> Callable[[Any, Any, Any], None]:
    """Return a validator: a number of at least *least*, or *above* it.

    Of at most *most*, finite unless *endless*, and without a fraction if *whole*.
    It refuses a NaN, a bool and, where it must be finite, whole numbers too large
    for a float, by *error*.

    >>> from llmd.balancer import Band
    >>> Band(max_wait=-1.0)
    Traceback (most recent call last):
    ...
    llmd.errors.PolicyError: Band.max_wait is -1.0, must be a number, at least 0
    """

    def check(instance: object, field: Any, value: Any) -> None:
        real = as_real(value)
        enough = real > least if above else real >= least
        parted = whole and real < math.inf and real % 1
        if enough and real <= most and (endless or real < math.inf) and not parted:
            return
        must = f"{'above' if above else 'at least'} {least:g}"
        if most < math.inf:
            must += f", at most {most:g}"
        kind = "whole number" if whole else "number"
        kind = kind if endless else f"finite {kind}"
        where = f"{type(instance).__name__}.{field.name}"
        raise error(f"{where} is {shown(value)}, must be a {kind}, {must}")

    return check


def as_real(value: Any) -> float:
    """Return a number as a float, infinite if too large; NaN of anything else."""
    known = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        return float(value) if known else math.nan
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def as_whole(value: Any) -> int | None:
    """Return a whole number of any kind, as of numpy, as an int; else None.

    >>> import numpy as np
    >>> as_whole(np.int8(3)), as_whole(3.0), as_whole(True)
    (3, None, None)
    """
    if type(value) is int:
        return value
    known = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(value) if known else None


def kind(of: type) -> Callable[[Any, Any, Any], None]:
    """Return a validator: an object of a kind, as its class is easily given."""

    def check(instance: object, field: Any, value: Any) -> None:
        if not isinstance(value, of):
            where = f"{type(instance).__name__}.{field.name}"
            raise PolicyError(f"{where}: {shown(value)} is no {of.__name__}")

    return check
