"""Routers that are asked and never obeyed."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import numpy as np

from ..decision import Decision
from ..types import Request, WorkerId
from ..view import View
from .interface import Around, Router


@attrs.define
class Agreement:
    """How a shadow did beside the router that is obeyed.

    Attributes:
        asked: Requests.
        agreed: Of them, sent where the shadow would have.
        failed: Of them, on which the shadow raised.
        regret: Sum over requests of what the shadow holds against the choice:
            its own cost of the worker that was chosen, less that of its own
            worker, in its own unit.
        last_error: Of its failures, in words.
    """

    asked: int = 0
    agreed: int = 0
    failed: int = 0
    regret: float = 0.0
    last_error: str = ""

    @property
    def rate(self) -> float:
        """Part of the requests on which both agree; NaN before the first."""
        judged = self.asked - self.failed
        return self.agreed / judged if judged else float("nan")

    @property
    def mean_regret(self) -> float:
        """Regret a request; NaN before the first."""
        judged = self.asked - self.failed
        return self.regret / judged if judged else float("nan")


@attrs.define(kw_only=True)
class Shadow(Around):
    """Obeys one router and asks *others* about the same requests and views.

    Shadows draw random numbers of their own, so that the router decides as it
    would alone; what they raise is counted.  A shadow's costs are in its
    own unit: its regret says how much worse *it* thinks the choice was, by its
    own model, not what would have happened.

    Attributes:
        others: The shadows, by name.
        seed: Of the shadows' randomness.
        agreement: How each did.

    >>> from llmd.router import LeastLoaded, LeastWork
    >>> shadow = Shadow(router=LeastWork(), others={"loaded": LeastLoaded()})
    >>> shadow.agreement["loaded"].asked
    0
    """

    others: Mapping[str, Router]
    seed: int = 0
    agreement: dict[str, Agreement] = attrs.field(init=False, repr=False)
    _rng: np.random.Generator = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.agreement = {name: Agreement() for name in self.others}
        self._rng = np.random.default_rng(self.seed)

    def pick(self, request: Request, view: View) -> Decision | None:
        return self.router.pick(request, view)

    def route(self, request: Request, view: View) -> Decision | None:
        decision = self.router.route(request, view)
        if decision is not None:
            aside = attrs.evolve(view, rng=self._rng)
            for name, other in self.others.items():
                self._ask(self.agreement[name], other, request, aside, decision)
        return decision

    def ended(
        self, request: Request, worker: WorkerId, error: str | None, view: View
    ) -> None:
        self.router.ended(request, worker, error, view)
        for name, other in self.others.items():
            try:
                other.ended(request, worker, error, view)
            except Exception as failure:
                self.agreement[name].failed += 1
                self.agreement[name].last_error = f"{type(failure).__name__}: {failure}"

    @staticmethod
    def _ask(
        kept: Agreement, other: Router, request: Request, view: View, chosen: Decision
    ) -> None:
        kept.asked += 1
        try:
            would = other.route(request, view)
        except Exception as error:
            kept.failed += 1
            kept.last_error = f"{type(error).__name__}: {error}"
            return
        if would is None:
            return
        kept.agreed += would == chosen
        if would.costs is not None and chosen.decode in would.candidates:
            row = would.candidates.index(chosen.decode)
            own = would.candidates.index(would.decode)
            regret = float(would.costs[row] - would.costs[own])
            kept.regret += regret if np.isfinite(regret) else 0.0
