"""The engines of a simulated fleet: who is there, and who has to go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import attrs

from ..types import Worker, WorkerId
from .worker import ModelWorker


@attrs.define(eq=False)
class Engine:
    """A model worker in a fleet.

    Attributes:
        model: It.
        joined_at: Seconds.
        wake: When it was last told to be woken; NaN if it was not.
        left_at: Seconds; infinity as long as it is there.
        draining: It takes nothing new and leaves when it is done.
    """

    model: ModelWorker
    joined_at: float
    wake: float = math.nan
    left_at: float = math.inf
    draining: bool = False

    @property
    def there(self) -> bool:
        """It has not left."""
        return self.left_at == math.inf


def staying(engines: Mapping[WorkerId, Engine], pool: str) -> list[WorkerId]:
    """Return who of *pool* is there and is not draining, in order of joining."""
    return [
        id
        for id, engine in engines.items()
        if engine.there and not engine.draining and belongs(engine.model.worker, pool)
    ]


def surplus(
    ids: list[WorkerId], wanted: int, burden: Callable[[WorkerId], int]
) -> list[WorkerId]:
    """Return who of *ids* goes if *wanted* stay: the emptiest, of equals the youngest.

    >>> surplus(["old", "new", "busy"], 1, {"old": 0, "new": 0, "busy": 3}.get)
    ['new', 'old']
    """
    youngest_first = ids[::-1]
    return sorted(youngest_first, key=burden)[: max(len(ids) - wanted, 0)]


def belongs(worker: Worker, pool: str) -> bool:
    """Say whether *worker* is of a pool: "" is all, or a machine, a role or a model."""
    role = worker.role.name or ""
    return pool in ("", worker.machine, role.lower()) or pool in worker.models
