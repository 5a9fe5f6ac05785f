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
    "graph_floor_s",
    "prefill_s_per_token",
    "attention_s_per_token2",
    "prefix_s_per_token",
    "decode_s_per_request",
    "decode_s_per_context_token",
    "hot_slowdown",
)
KNEES = (1.0, 1.3, 1.6, 2.0, 2.5)
_LEAST = 1e-15
_OUTLYING = 0.03
_ITERATIONS = 200


@attrs.frozen
class Step:
    """One measured step: what `Machine.step_s` is given, and how long it took.

    Attributes:
        prefill_tokens: As of `Machine.step_s`, and the next three.
        seconds: That it took.
        ready: The host had made it ready before: it followed another.
        heat: 0 on a GPU that had rested, 1 on one that computed prompts all the time.

    >>> Step(0, 0, 16, 16 * 576, 5.1e-3).seconds
    0.0051
    """

    prefill_tokens: float
    prefill_context: float
    decode_requests: float
    context_tokens: float
    seconds: float
    ready: bool = False
    heat: float = 0.0


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
        _predict(_parameters(machine), table, Form.of(machine)) / table[:, 4] - 1
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
        start: Where to begin, best from `Machine.of`; its `graph_tokens` stay.

    Raises:
        InvalidHardware: There is no step, or one with no positive time.
    """
    table, machine = _table(steps), start or Machine()
    if hot := bool((table[:, 6] > 0).any()):
        machine = attrs.evolve(machine, hot_slowdown=machine.hot_slowdown or 0.05)
    begin = np.log(np.maximum(_parameters(machine), _LEAST))
    forms = [Form(knee, machine.graph_tokens) for knee in KNEES]
    fits = [(*_descend(begin, table, form), form.knee) for form in forms]
    _, best, knee = min(fits, key=lambda fit: fit[0])
    values = dict(zip(PARAMETERS, np.exp(best).tolist(), strict=True))
    if not hot:
        del values["hot_slowdown"]
    return attrs.evolve(machine, knee=knee, **values)


@attrs.frozen
class Form:
    """What of a machine is given when its parameters are sought."""

    knee: float
    graph_tokens: float

    @classmethod
    def of(cls, machine: Machine) -> Form:
        """Return that of *machine*."""
        return cls(machine.knee, machine.graph_tokens)


def _descend(logs: Floats, table: Floats, form: Form) -> tuple[float, Floats]:
    """Return the least loss found from *logs* on, and where."""
    damping = 1e-3
    residuals = _residuals(logs, table, form)
    loss = _loss(residuals)
    for _ in range(_ITERATIONS):
        slopes = _slopes(logs, table, form, residuals)
        weighted = slopes / np.maximum(1.0, np.abs(residuals) / _OUTLYING)[:, None]
        normal = weighted.T @ slopes
        brake = damping * np.diag(np.diag(normal) + 1e-9)
        step = np.linalg.solve(normal + brake, -weighted.T @ residuals)
        tried = np.maximum(logs + np.clip(step, -2.0, 2.0), np.log(_LEAST))
        new_residuals = _residuals(tried, table, form)
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
    # A context may be: that of several short prompts, see `merged_context`.
    if (table[:, [0, 2, 3]] < 0).any():
        raise InvalidHardware("a step has less than no token or request")
    if not ((table[:, 6] >= 0) & (table[:, 6] <= 1)).all():
        raise InvalidHardware("a step's heat must be in [0, 1]")
    return table


def _parameters(machine: Machine) -> Floats:
    return np.array([getattr(machine, name) for name in PARAMETERS])


def _predict(parameters: Floats, table: Floats, form: Form) -> Floats:
    """`Machine.step_s` over a table, shape (steps,)."""
    prompt, ahead, requests, context, _, ready, heat = table.T
    tokens, knee = prompt + requests, form.knee
    floor = np.where(tokens <= form.graph_tokens, parameters[2], parameters[0])
    floor = np.where((prompt > 0) & (ready == 0), floor, parameters[1])
    slower = np.where(prompt > 0, 1 + parameters[8] * heat, 1.0)
    products = parameters[3] * tokens * slower
    predicted: Floats = (
        (floor**knee + products**knee) ** (1 / knee)
        + parameters[4] * prompt * (ahead + prompt / 2) * slower
        + parameters[5] * np.maximum(ahead, 0.0) * (ready == 0)
        + parameters[6] * requests
        + parameters[7] * context
    )
    return predicted


def _residuals(logs: Floats, table: Floats, form: Form) -> Floats:
    residuals: Floats = np.log(_predict(np.exp(logs), table, form) / table[:, 4])
    return residuals


def _loss(residuals: Floats) -> float:
    """Huber's loss: square up to what is outlying, straight beyond."""
    size = np.abs(residuals)
    straight = 2 * _OUTLYING * size - _OUTLYING**2
    return float(np.where(size < _OUTLYING, size**2, straight).sum())


def _slopes(logs: Floats, table: Floats, form: Form, at: Floats) -> Floats:
    slopes = np.empty((len(at), len(logs)))
    for column in range(len(logs)):
        moved = logs.copy()
        moved[column] += 1e-6
        slopes[:, column] = (_residuals(moved, table, form) - at) / 1e-6
    return slopes
