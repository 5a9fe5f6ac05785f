"""Parameters that make sense, for whatever a balancer is set up with."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import attrs

from ..errors import PolicyError, shown


def a_number(
    least: float = 0.0,
    *,
    above: bool = False,
    most: float = math.inf,
    endless: bool = False,
    whole: bool = False,
) -> Callable[[Any, Any, Any], None]:
    """Return a validator: a number of at least *least*, or *above* it.

    Of at most *most*, finite unless *endless*, and without a fraction if *whole*.
    It refuses a NaN, a bool and, where it must be finite, whole numbers too large
    for a float.

    >>> from llmd.balancer import Band
    >>> Band(max_wait=-1.0)
    Traceback (most recent call last):
    ...
    llmd.errors.PolicyError: Band.max_wait is -1.0, must be a number, at least 0
    """

    def check(instance: object, field: Any, value: Any) -> None:
        real = _real(value)
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
        raise PolicyError(f"{where} is {shown(value)}, must be a {kind}, {must}")

    return check


def _real(value: Any) -> float:
    """Return a number as a float, infinite if too large; NaN of anything else."""
    known = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        return float(value) if known else math.nan
    except OverflowError:
        return math.inf if value > 0 else -math.inf


AMOUNT = a_number()
POSITIVE = a_number(above=True)
LIMIT = a_number(above=True, endless=True)
WAIT = a_number(endless=True)
COUNT = a_number(1, whole=True)
WAIT_IF_ANY = attrs.validators.optional(WAIT)
COUNT_LIMIT = a_number(1, endless=True, whole=True)
COUNT_LIMIT_IF_ANY = attrs.validators.optional(COUNT_LIMIT)


def weights(instance: object, field: Any, value: Mapping[Hashable, float]) -> None:
    """Raise unless each weight is a finite number above 0."""
    where = f"{type(instance).__name__}.{field.name}"
    if not isinstance(value, Mapping):
        raise PolicyError(f"{where} is {shown(value)}, must be a mapping")
    for tenant, weight in value.items():
        if not 0 < _real(weight) < math.inf:
            raise PolicyError(
                f"{where}: the weight of {shown(tenant)} is {shown(weight)},"
                " must be a finite number, above 0"
            )


def kind(of: type) -> Callable[[Any, Any, Any], None]:
    """Return a validator: an object of a kind, as its class is easily given."""

    def check(instance: object, field: Any, value: Any) -> None:
        if not isinstance(value, of):
            where = f"{type(instance).__name__}.{field.name}"
            raise PolicyError(f"{where}: {shown(value)} is no {of.__name__}")

    return check
