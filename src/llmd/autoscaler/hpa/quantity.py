"""Kubernetes quantities, such as 500m and 8Gi, in whole thousandths."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import TypeAlias

from ...errors import InvalidPolicy, shown

Quantity: TypeAlias = str | int | float | Fraction

_FORM = re.compile(
    r"(?P<number>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))"
    r"(?P<suffix>[numkMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]{1,3})?"
)
_DECIMAL = {
    suffix: Fraction(10) ** (3 * step) for step, suffix in enumerate("kMGTPE", 1)
}
_SMALL = {suffix: Fraction(10) ** (-3 * step) for step, suffix in enumerate("mun", 1)}
_BINARY = {
    f"{suffix}i": Fraction(1024) ** step for step, suffix in enumerate("KMGTPE", 1)
}
_FACTORS = _DECIMAL | _SMALL | _BINARY


def milli(quantity: Quantity) -> int:
    """Return *quantity* in thousandths, rounded away from zero as Kubernetes does.

    Grammar: k8s.io/apimachinery pkg/api/resource/quantity.go.

    Raises:
        InvalidPolicy: It is no quantity.

    >>> milli("500m"), milli("8Gi"), milli(0.8), milli("1e3")
    (500, 8589934592000, 800, 1000000)
    """
    thousandths = exact(quantity) * 1000
    size = math.ceil(abs(thousandths))
    return size if thousandths >= 0 else -size


def exact(quantity: Quantity) -> Fraction:
    """Return *quantity* as it is.

    Raises:
        InvalidPolicy: It is no quantity.

    >>> exact("500u"), exact(0.1)
    (Fraction(1, 2000), Fraction(1, 10))
    """
    if isinstance(quantity, bool):
        raise InvalidPolicy(f"{shown(quantity)} is no quantity")
    if isinstance(quantity, int | Fraction):
        return Fraction(quantity)
    # By way of its shortest decimal form, so that 0.1 is a tenth.
    text = repr(quantity) if isinstance(quantity, float) else str(quantity)
    form = _FORM.fullmatch(text)
    if form is None:
        raise InvalidPolicy(f"{shown(quantity)} is no quantity")
    number, suffix = Fraction(form["number"]), form["suffix"] or ""
    if suffix in _FACTORS:
        return number * _FACTORS[suffix]
    return number * Fraction(10) ** int(suffix[1:]) if suffix else number
