"""How long a turn should be: long enough to pay, short enough to keep a promise.

With a switch of S seconds, a turn of Q wastes e = S / (Q + S); N engines in a
ring make one of them wait at most (N - 1)(Q + S) + S.  So

    Q >= S (1 - e) / e          and          Q <= (B - S) / (N - 1) - S

for a waste of at most e and a wait of at most B.  The two may contradict each
other; then no quantum will do, and there are too many engines on the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs

from ..errors import InvalidSlice


def quantum_for_overhead(switch_s: float, overhead: float) -> float:
    """Return the shortest turn that wastes at most *overhead*, in (0, 1).

    Raises:
        InvalidSlice: The overhead is not, or a switch takes no finite time.

    >>> round(quantum_for_overhead(0.35, 0.05), 2)
    6.65
    """
    if not 0 < overhead < 1:
        raise InvalidSlice(f"overhead is {overhead}, must be in (0, 1)")
    _check_switches([switch_s])
    return switch_s * (1 - overhead) / overhead


def quantum_cap(switch_s: float, max_wait_s: float, engines: int) -> float:
    """Return the longest turn that keeps every wait under *max_wait_s*.

    Zero or less means that none does.

    Raises:
        InvalidSlice: A switch takes no finite time, or the wait is a NaN.

    >>> round(quantum_cap(0.35, 2.0, 3), 3), quantum_cap(0.35, 1.0, 3) > 0
    (0.475, False)
    """
    _check_switches([switch_s])
    _check_wait(max_wait_s)
    if engines < 2:
        return math.inf
    return (max_wait_s - switch_s) / (engines - 1) - switch_s


@attrs.frozen(kw_only=True)
class Quantum:
    """A turn's length and what comes of it.

    Attributes:
        seconds: Of the turn of the engine with the smallest weight; others get
            it in proportion.
        overhead: Part of the time that goes into switching, if all turns are
            used up.
        wait_s: The longest wait for a turn.
        feasible: Both targets are met.
        engines_that_fit: How many engines could be there with both targets met.
    """

    seconds: float
    overhead: float
    wait_s: float
    feasible: bool
    engines_that_fit: int


def choose_quantum(
    weights: Sequence[float],
    switches_s: Sequence[float],
    overhead: float,
    max_wait_s: float = math.inf,
) -> Quantum:
    """Choose the shortest turn that wastes no more than *overhead*.

    Where that makes somebody wait longer than *max_wait_s*, the longest turn
    that does not; where there is none either, the shortest again.

    Args:
        weights: Of the engines, (N,).
        switches_s: Seconds to switch to each, (N,).
        overhead: Part of the time that switching may take, in (0, 1).
        max_wait_s: Longest wait for a turn, its switch included.

    Raises:
        InvalidSlice: The numbers of weights and switches differ, or one of them
            is not what it must be: weights above 0, switches of 0 s or more,
            all finite.

    >>> choose_quantum([1, 1, 1], [0.06] * 3, 0.1, 2.0).feasible
    True
    >>> choose_quantum([1, 1, 1], [0.35] * 3, 0.1, 2.0).engines_that_fit
    1
    """
    if not weights or len(weights) != len(switches_s):
        raise InvalidSlice(f"weights {weights} and switches {switches_s} do not match")
    if not all(0 < weight < math.inf for weight in weights):
        raise InvalidSlice(f"weights {weights} must be finite and above 0")
    _check_switches(switches_s)
    _check_wait(max_wait_s)
    parts = [weight / min(weights) for weight in weights]
    pays = max(
        quantum_for_overhead(switch, overhead) / part
        for part, switch in zip(parts, switches_s, strict=True)
    )
    cap = _cap(parts, switches_s, max_wait_s)
    seconds = pays if pays <= cap or cap <= 0 else cap
    worst = max(switches_s)
    return Quantum(
        seconds=seconds,
        overhead=max(
            switch / (switch + seconds * part) if switch else 0.0
            for part, switch in zip(parts, switches_s, strict=True)
        ),
        wait_s=max(
            sum(seconds * part for part in parts) - seconds * part + sum(switches_s)
            for part in parts
        )
        if len(parts) > 1
        else worst,
        feasible=pays <= cap,
        engines_that_fit=_fitting(worst, overhead, max_wait_s, len(parts)),
    )


def _check_switches(switches_s: Sequence[float]) -> None:
    if not all(0 <= switch_s < math.inf for switch_s in switches_s):
        raise InvalidSlice(f"switches of {switches_s} s must be finite and 0 or more")


def _check_wait(max_wait_s: float) -> None:
    if math.isnan(max_wait_s):
        raise InvalidSlice("max_wait_s is a NaN")


def _cap(parts: Sequence[float], switches_s: Sequence[float], limit: float) -> float:
    """`quantum_cap` for engines that differ: the turn of a part of 1."""
    if len(parts) < 2:
        return math.inf
    rest = limit - sum(switches_s)
    return min(rest / (sum(parts) - part) for part in parts)


def _fitting(switch_s: float, overhead: float, limit: float, engines: int) -> int:
    """How many equal engines, of the slowest kind, meet both targets."""
    pays = quantum_for_overhead(switch_s, overhead)
    fitting = 1
    while fitting < engines and pays <= quantum_cap(switch_s, limit, fitting + 1):
        fitting += 1
    return fitting
