"""How many workers: the `Autoscaler` interface and load followers."""

from __future__ import annotations

import abc
import math
from collections import deque

import attrs

from ..errors import PolicyError
from ..view import View


@attrs.define(kw_only=True)
class Autoscaler(abc.ABC):
    """Follows a wish with bounds and patience.

    Subclasses implement `wanted` and need not care about flapping: the
    target is the largest wish of the last `patience` seconds.

    Attributes:
        min_workers: Never fewer.
        max_workers: Never more.
        patience: Seconds a smaller wish must last before it counts.

    >>> class OneSpare(Autoscaler):
    ...     def wanted(self, view):
    ...         return (view.workers.running_requests > 0).sum() + 1
    """

    min_workers: int = 1
    max_workers: int = 1
    patience: float = 300.0
    _wishes: deque[tuple[float, int]] = attrs.field(factory=deque, init=False)

    @abc.abstractmethod
    def wanted(self, view: View) -> float:
        """Return how many workers the load at this moment deserves."""

    def target(self, view: View) -> int:
        """Return how many workers there should be.

        Raises:
            PolicyError: `wanted` gave a NaN or an infinity.
        """
        wanted = float(self.wanted(view))
        if not math.isfinite(wanted):
            raise PolicyError(f"{self!r} wants {wanted} workers")
        wish = math.ceil(wanted)
        while self._wishes and self._wishes[-1][1] <= wish:
            self._wishes.pop()
        self._wishes.append((view.now, wish))
        while self._wishes[0][0] < view.now - self.patience:
            self._wishes.popleft()
        return min(max(self._wishes[0][1], self.min_workers), self.max_workers)


@attrs.define(kw_only=True)
class TargetConcurrency(Autoscaler):
    """Keeps requests per worker near a target.

    Attributes:
        requests_per_worker: Running and waiting together.

    >>> TargetConcurrency(requests_per_worker=5, max_workers=4).patience
    300.0
    """

    requests_per_worker: float

    def wanted(self, view: View) -> float:
        running = int(view.workers.running_requests.sum())
        return (running + len(view.waiting)) / self.requests_per_worker
