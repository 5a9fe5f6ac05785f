"""Arrival times."""

from __future__ import annotations

import math

import numpy as np

from ..amounts import as_real
from ..errors import InvalidRequest, shown
from ..view import Floats


def poisson(rate: float, requests: int, rng: np.random.Generator) -> Floats:
    """Draw arrival times of a Poisson process of *rate* a second, (requests,)."""
    return gamma(rate, requests, rng, burstiness=1.0)


def gamma(
    rate: float, requests: int, rng: np.random.Generator, burstiness: float
) -> Floats:
    """Draw arrival times with gamma gaps, shape (requests,).

    Args:
        rate: Requests a second.
        requests: How many.
        rng: Source of randomness.
        burstiness: Squared coefficient of variation of the gaps: 1 is Poisson,
            more comes in bursts, less is more even (0 exactly even).
    """
    if not (0.0 < as_real(rate) < math.inf and 0.0 <= as_real(burstiness) < math.inf):
        raise InvalidRequest(
            f"rate {shown(rate)} and burstiness {shown(burstiness)} make no arrivals"
        )
    if burstiness == 0:
        return np.arange(requests) / rate
    shape = 1.0 / burstiness
    gaps = rng.gamma(shape, 1.0 / (rate * shape), requests)
    times: Floats = np.cumsum(gaps)
    return times
