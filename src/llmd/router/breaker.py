"""A router that learns from failures."""

from __future__ import annotations

import attrs
import numpy as np

from ..decision import Decision, Term
from ..types import Request, RequestId, WorkerId
from ..view import Floats, View
from .gates import spare
from .interface import Around

_KEPT = 1 << 12


@attrs.define(eq=False)
class _Circuit:
    """How one worker has done.

    closed -> open       *failures* in a row
    open -> half open    after *rest* seconds: one request may try
    half open -> closed  it ended well;  -> open  it failed
    """

    failures: int = 0
    opened_at: float | None = None
    trial: RequestId | None = None


@attrs.define(kw_only=True)
class CircuitBreaker(Around):
    """Rests a worker that keeps failing, and retries elsewhere.

    After *failures* in a row a worker is ruled out for *rest* seconds; then one
    request may try it, and its end decides.  A request that failed on a worker
    does not go back there.  Neither ever rules out all that are left: with every
    circuit open the router decides as if none were.

    Attributes:
        failures: In a row, until a worker rests.
        rest: Seconds.

    >>> from llmd.router import LeastWork
    >>> CircuitBreaker(router=LeastWork()).failures
    3
    """

    failures: int = 3
    rest: float = 10.0
    _circuits: dict[WorkerId, _Circuit] = attrs.field(
        factory=dict, init=False, repr=False
    )
    _failed_on: dict[RequestId, tuple[WorkerId, ...]] = attrs.field(
        factory=dict, init=False, repr=False
    )

    def is_open(self, worker: WorkerId, now: float) -> bool:
        """Say whether *worker* gets no requests at *now*."""
        circuit = self._circuits.get(worker)
        if circuit is None or circuit.opened_at is None:
            return False
        return now < circuit.opened_at + self.rest or circuit.trial is not None

    def price(self, request: Request, view: View) -> tuple[Floats, tuple[Term, ...]]:
        costs, terms = self.router.price(request, view)
        ids = view.workers.ids
        if self._circuits:
            out = np.array([self.is_open(id, view.now) for id in ids], dtype=np.bool_)
            costs = spare(costs, out)
        before = self._failed_on.get(request.id)
        if before:
            costs = spare(costs, np.array([id in before for id in ids], np.bool_))
        return costs, terms

    def pick(self, request: Request, view: View) -> Decision | None:
        decision = super().pick(request, view)
        if decision is None or decision.decode not in self._circuits:
            return decision
        circuit = self._circuits[decision.decode]
        if circuit.opened_at is not None and circuit.trial is None:
            circuit.trial = request.id
            return attrs.evolve(decision, notes=(*decision.notes, "a trial"))
        return decision

    def ended(
        self, request: Request, worker: WorkerId, error: str | None, view: View
    ) -> None:
        self.router.ended(request, worker, error, view)
        if error is None:
            self._circuits.pop(worker, None)
            self._failed_on.pop(request.id, None)
            return
        self._failed_on[request.id] = (*self._failed_on.get(request.id, ()), worker)
        circuit = self._circuits.setdefault(worker, _Circuit())
        circuit.failures += 1
        if circuit.failures >= self.failures or circuit.trial == request.id:
            circuit.opened_at, circuit.trial = view.now, None
        for table in (self._circuits, self._failed_on):
            if len(table) > _KEPT:
                del table[next(iter(table))]
