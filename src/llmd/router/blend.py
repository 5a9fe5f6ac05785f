"""Weighted scores, as llm-d's endpoint picker writes them.

>>> 3 * PrefixOverlap() + 2 * KVHeadroom() + 2 * QueueDepth()
3 * PrefixOverlap() + 2 * KVHeadroom() + 2 * QueueDepth()
"""

from __future__ import annotations

import abc

import attrs
import numpy as np

from ..decision import Term
from ..types import Request, Tier
from ..view import Floats, View
from .interface import TermRouter


class Score(abc.ABC):
    """Rates each worker in [0, 1], higher is better; multiply and add them.

    >>> class Calm(Score):
    ...     unit = "requests"
    ...     def signal(self, request, view):
    ...         return view.workers.waiting_requests
    ...     def rate(self, signal):
    ...         return 1 / (1 + signal)
    >>> 0.5 * Calm() + PrefixOverlap()
    0.5 * Calm() + 1 * PrefixOverlap()
    """

    unit: str = ""

    @abc.abstractmethod
    def signal(self, request: Request, view: View) -> Floats:
        """Return what is measured, shape (W,)."""

    @abc.abstractmethod
    def rate(self, signal: Floats) -> Floats:
        """Turn the signal into scores in [0, 1], shape (W,)."""

    def age(self, view: View) -> Floats | float:
        """Return how old the signal is, in seconds."""
        return 0.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __rmul__(self, weight: float) -> Blend:
        return Blend(((float(weight), self),))

    def __add__(self, other: Score | Blend) -> Blend:
        return 1 * self + other


@attrs.frozen(repr=False)
class Blend(TermRouter):
    """Sends each request to the worker with the highest weighted score.

    Attributes:
        scores: Weights and scores.

    >>> print(*(weight for weight, _ in (2 * PrefixOverlap() + QueueDepth()).scores))
    2.0 1.0
    """

    scores: tuple[tuple[float, Score], ...]

    def terms(self, request: Request, view: View) -> tuple[Term, ...]:
        return tuple([self._term(w, s, request, view) for w, s in self.scores])

    def _term(self, weight: float, score: Score, request: Request, view: View) -> Term:
        signal = np.array(score.signal(request, view), dtype=np.float64)
        # Scores add to what is good, costs to what is bad: hence the sign.
        return Term(
            name=type(score).__name__,
            raw=signal,
            unit=score.unit,
            value=score.rate(signal),
            weight=-weight,
            age=score.age(view),
        )

    def __add__(self, other: Score | Blend) -> Blend:
        more = other.scores if isinstance(other, Blend) else ((1.0, other),)
        return Blend(self.scores + more)

    def __repr__(self) -> str:
        return " + ".join(f"{weight:g} * {score!r}" for weight, score in self.scores)


class PrefixOverlap(Score):
    """Part of the prompt's own tokens that the worker holds.

    >>> PrefixOverlap()
    PrefixOverlap()
    """

    unit = "of prompt"

    def signal(self, request: Request, view: View) -> Floats:
        held = view.cached_tokens(request)[:, Tier.GPU]
        return held / request.prompt_tokens

    def rate(self, signal: Floats) -> Floats:
        return signal


class KVHeadroom(Score):
    """Part of the KV cache that no running request needs.

    The engine's own figure counts where it is known; what was dispatched
    since is only in the cluster's books, so the fuller of the two is used.

    >>> KVHeadroom()
    KVHeadroom()
    """

    unit = "used"

    def signal(self, request: Request, view: View) -> Floats:
        workers = view.workers
        booked = workers.context_tokens / workers.kv_tokens
        return np.fmin(np.fmax(booked, workers.reported_kv_usage), 1.0)

    def rate(self, signal: Floats) -> Floats:
        return 1.0 - signal

    def age(self, view: View) -> Floats:
        return _age(view)


class QueueDepth(Score):
    """How short the worker's queue is among all: the shortest 1, the longest 0.

    llm-d's queue-scorer: min-max normalised, all equal counts as 1.

    >>> QueueDepth()
    QueueDepth()
    """

    unit = "waiting"

    def signal(self, request: Request, view: View) -> Floats:
        workers = view.workers
        return np.fmax(workers.waiting_requests, workers.reported_waiting)

    def rate(self, signal: Floats) -> Floats:
        if not len(signal):
            return signal
        low, high = signal.min(), signal.max()
        if low == high:
            return np.ones_like(signal)
        short: Floats = (high - signal) / (high - low)
        return short

    def age(self, view: View) -> Floats:
        return _age(view)


def _age(view: View) -> Floats:
    """Return the age of the engines' reports; 0 where there was none."""
    age = view.now - view.workers.reported_at
    return np.where(np.isnan(age), 0.0, age)
