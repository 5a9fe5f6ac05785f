"""Fit a machine's step times to a probe or a table, by least squares in numpy."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import numpy as np

from ..errors import InvalidHardware
from ..view import Floats
from .machine import Machine

PARAMETERS = (
    "prefill_floor_s",
    "decode_floor_s",
    "prefill_s_per_token",
    "attention_s_per_token2",
    "prefix_s_per_token",
    "decode_s_per_request",
    "decode_s_per_context_token",
)
KNEES = (1.3, 1.6, 2.0, 2.5)
_LEAST = 1e-15
_OUTLYING = 0.03
_ITERATIONS = 200


@attrs.frozen
class Step:
    """One measured step; the arguments of `Machine.step_s` and the outcome.

    >>> Step(0, 0, 16, 16 * 576, 5.1e-3).seconds
    0.0051
    """

    prefill_tokens: float
    prefill_context: float
    decode_requests: float
    context_tokens: float
    seconds: float


@attrs.frozen(kw_only=True)
class Errors:
    """Relative errors of a machine on measured steps, all in [0, inf)."""

    steps: int
    median: float
    p90: float
    worst: float

    def __str__(self) -> str:
        return (
            f"{self.steps} steps: median {self.median:.1%}, p90 {self.p90:.1%},"
            f" worst {self.worst:.1%}"
        )


def errors(machine: Machine, steps: Iterable[Step]) -> Errors:
    """Compare *machine* with measured steps.

    Raises:
        InvalidHardware: There is no step.
    """
    table = _table(steps)
    found = np.abs(
        _predict(_parameters(machine), table, machine.knee) / table[:, 4] - 1
    )
    return Errors(
        steps=len(found),
        median=float(np.median(found)),
        p90=float(np.quantile(found, 0.9)),
        worst=float(found.max()),
    )


def fit_from_probe(steps: Iterable[Step], start: Machine | None = None) -> Machine:
    """Return *start* with the step times that fit *steps* best.

    Levenberg-Marquardt on the logarithm of each parameter and of the time:
    parameters stay positive and a short step counts as much as a long one.
    Errors beyond 3 % weigh less the larger they are, so that one odd kernel
    does not bend the rest.  The knee is the best of a few.  What no step can
    tell keeps its start value, e.g. everything about decode in a probe of
    prompts only.

    Args:
        steps: A probe of some 30 steps over all sizes takes seconds to run.
        start: Where to begin, best from `Machine.of`.

    Raises:
        InvalidHardware: There is no step, or one with no positive time.
    """
    table, machine = _table(steps), start or Machine()
    begin = np.log(np.maximum(_parameters(machine), _LEAST))
    fits = [(*_descend(begin, table, knee), knee) for knee in KNEES]
    _, best, knee = min(fits, key=lambda fit: fit[0])
    values = dict(zip(PARAMETERS, np.exp(best).tolist(), strict=True))
    return attrs.evolve(machine, knee=knee, **values)


def _descend(logs: Floats, table: Floats, knee: float) -> tuple[float, Floats]:
    """Return the least loss found from *logs* on, and where."""
    damping = 1e-3
    residuals = _residuals(logs, table, knee)
    loss = _loss(residuals)
    for _ in range(_ITERATIONS):
        slopes = _slopes(logs, table, knee, residuals)
        weighted = slopes / np.maximum(1.0, np.abs(residuals) / _OUTLYING)[:, None]
        normal = weighted.T @ slopes
        brake = damping * np.diag(np.diag(normal) + 1e-9)
        step = np.linalg.solve(normal + brake, -weighted.T @ residuals)
        tried = np.maximum(logs + np.clip(step, -2.0, 2.0), np.log(_LEAST))
        new_residuals = _residuals(tried, table, knee)
        new_loss = _loss(new_residuals)
        if new_loss >= loss:
            damping *= 4
            if damping > 1e9:
                break
            continue
        done = loss - new_loss < 1e-12
        logs, residuals, loss = tried, new_residuals, new_loss
        damping = max(damping / 3, 1e-9)
        if done:
            break
    return loss, logs


def _table(steps: Iterable[Step]) -> Floats:
    table = np.array([attrs.astuple(step) for step in steps], dtype=np.float64)
    if not len(table):
        raise InvalidHardware("a probe without steps tells nothing")
    if not (np.isfinite(table).all() and (table[:, 4] > 0).all()):
        raise InvalidHardware("a step's amounts must be finite, its seconds above 0")
    return table


def _parameters(machine: Machine) -> Floats:
    return np.array([getattr(machine, name) for name in PARAMETERS])


def _predict(parameters: Floats, table: Floats, knee: float) -> Floats:
    """`Machine.step_s` over a table, shape (steps,)."""
    prompt, ahead, requests, context = table[:, :4].T
    floor = np.where(prompt > 0, parameters[0], parameters[1])
    products = parameters[2] * (prompt + requests)
    predicted: Floats = (
        (floor**knee + products**knee) ** (1 / knee)
        + parameters[3] * prompt * (ahead + prompt / 2)
        + parameters[4] * np.maximum(ahead, 0.0)
        + parameters[5] * requests
        + parameters[6] * context
    )
    return predicted


def _residuals(logs: Floats, table: Floats, knee: float) -> Floats:
    residuals: Floats = np.log(_predict(np.exp(logs), table, knee) / table[:, 4])
    return residuals


def _loss(residuals: Floats) -> float:
    """Huber's loss: square up to what is outlying, straight beyond."""
    size = np.abs(residuals)
    straight = 2 * _OUTLYING * size - _OUTLYING**2
    return float(np.where(size < _OUTLYING, size**2, straight).sum())


def _slopes(logs: Floats, table: Floats, knee: float, at: Floats) -> Floats:
    slopes = np.empty((len(at), len(logs)))
    for column in range(len(logs)):
        moved = logs.copy()
        moved[column] += 1e-6
        slopes[:, column] = (_residuals(moved, table, knee) - at) / 1e-6
    return slopes
