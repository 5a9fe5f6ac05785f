"""Amounts that make sense, for whatever a balancer is set up with."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import attrs

from ..amounts import a_number, as_real
from ..errors import PolicyError, shown

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
        if not 0 < as_real(weight) < math.inf:
            raise PolicyError(
                f"{where}: the weight of {shown(tenant)} is {shown(weight)},"
                " must be a finite number, above 0"
            )
