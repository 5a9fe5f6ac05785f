"""Amounts that make sense, for whatever a balancer is set up with."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import attrs

from ..amounts import a_number, as_real
from ..errors import PolicyError, shown

_LEAST_WEIGHT = 1e-6

AMOUNT = a_number()
POSITIVE = a_number(above=True)
LIMIT = a_number(above=True, endless=True)
WAIT = a_number(endless=True)
WHOLE = a_number(whole=True)
COUNT = a_number(1, whole=True)
WAIT_IF_ANY = attrs.validators.optional(WAIT)
COUNT_LIMIT = a_number(1, endless=True, whole=True)
COUNT_LIMIT_IF_ANY = attrs.validators.optional(COUNT_LIMIT)


def a_callable(instance: object, field: Any, value: Any) -> None:
    """Raise unless *value* can be called."""
    if not callable(value):
        where = f"{type(instance).__name__}.{field.name}"
        raise PolicyError(f"{where} is {shown(value)}, must be a function")


def weights(instance: object, field: Any, value: Mapping[Hashable, float]) -> None:
    """Raise unless each weight is a number that counters can be divided by."""
    where = f"{type(instance).__name__}.{field.name}"
    if not isinstance(value, Mapping):
        raise PolicyError(f"{where} is {shown(value)}, must be a mapping")
    for tenant, weight in value.items():
        if not _LEAST_WEIGHT <= as_real(weight) <= 1 / _LEAST_WEIGHT:
            raise PolicyError(
                f"{where}: the weight of {shown(tenant)} is {shown(weight)},"
                f" must be a number from {_LEAST_WEIGHT:g} to {1 / _LEAST_WEIGHT:g}"
            )
