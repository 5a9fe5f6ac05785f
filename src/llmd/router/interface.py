"""The `Router` interface."""

from __future__ import annotations

import abc
import math
from typing import Any

import attrs
import numpy as np

from ..copied import Copied
from ..decision import Decision, Term
from ..errors import PolicyError
from ..types import Request, Role, WorkerId
from ..view import Floats, View

_FLOAT64 = np.dtype(np.float64)


class Router(Copied, abc.ABC):
    """Chooses a worker for each request.

    Subclasses implement `cost`; those that choose more than one worker
    override `route`.  Whichever of `cost` and `price` a class defines, the other
    follows from it, also where it inherits both.

    >>> class Shortest(Router):
    ...     def cost(self, request, view):
    ...         return view.workers.waiting_requests
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        defined = cls.__dict__.keys() & {"cost", "price", "terms"}
        if defined == {"cost"}:
            cls.price = Router.price  # type: ignore[method-assign]
        elif defined == {"price"}:
            cls.cost = _first_of_price  # type: ignore[method-assign]

    @abc.abstractmethod
    def cost(self, request: Request, view: View) -> Floats:
        """Price each worker for *request*, shape (W,); lower is better.

        Only the order matters, except that infinity rules a worker out.
        The routers here price in seconds, so that costs may be added.
        """

    def price(self, request: Request, view: View) -> tuple[Floats, tuple[Term, ...]]:
        """Return the cost and the terms that explain it."""
        return self.cost(request, view), ()

    def choose(self, costs: Floats, view: View) -> tuple[int, int]:
        """Return the row of a cheapest worker, and how many tie for it."""
        row = int(costs.argmin())
        equal = costs == costs.item(row)
        tied = int(np.count_nonzero(equal))
        if tied > 1:
            row = int(np.flatnonzero(equal)[view.rng.integers(tied)])
        return row, tied

    def pick(self, request: Request, view: View) -> Decision | None:
        """Decide for a cheapest worker of *view*, ties broken by `view.rng`.

        Returns:
            None if every worker is ruled out.

        Raises:
            PolicyError: `cost` gave a wrong shape or a NaN.
        """
        priced, terms = self.price(request, view)
        costs = np.asarray(priced)
        if costs.dtype != _FLOAT64:
            if np.iscomplexobj(costs):
                raise PolicyError(f"{type(self).__name__} priced with complex numbers")
            costs = costs.astype(np.float64)
        ids = view.workers.ids
        if costs.shape != (len(ids),):
            raise PolicyError(
                f"{type(self).__name__} priced {len(ids)} workers"
                f" with an array of shape {costs.shape}"
            )
        if not len(ids):
            return None
        lowest = costs.item(costs.argmin())
        if lowest != lowest:  # a NaN anywhere is the minimum
            worker = ids[costs.argmin()]
            raise PolicyError(f"{type(self).__name__} priced {worker!r} at NaN")
        if lowest == math.inf:
            return None
        row, tied = self.choose(costs, view)
        return Decision(
            decode=ids[row], candidates=ids, costs=costs, terms=terms, tied=tied
        )

    def route(self, request: Request, view: View) -> Decision | None:
        """Choose among the workers of *view*, all ready and with room.

        Only workers able to do both prefill and decode are considered here.

        Returns:
            None to leave the request waiting.
        """
        return self.pick(request, view.only(view.workers.able(Role.BOTH)))

    def ended(
        self, request: Request, worker: WorkerId, error: str | None, view: View
    ) -> None:
        """Note how what *worker* was given ended; *error* is None if well."""


def _first_of_price(self: Router, request: Request, view: View) -> Floats:
    return self.price(request, view)[0]


class TermRouter(Router):
    """A router whose cost is a sum of terms, which then explain it."""

    @abc.abstractmethod
    def terms(self, request: Request, view: View) -> tuple[Term, ...]:
        """Return what to add up: each term's value times its weight, (W,)."""

    def price(self, request: Request, view: View) -> tuple[Floats, tuple[Term, ...]]:
        terms = self.terms(request, view)
        if not terms:
            return np.zeros(len(view.workers), dtype=np.float64), terms
        first, *others = terms
        costs: Floats = first.value * first.weight
        for term in others:
            costs += term.value if term.weight == 1.0 else term.weight * term.value
        return costs, terms

    def cost(self, request: Request, view: View) -> Floats:
        return TermRouter.price(self, request, view)[0]


@attrs.define(kw_only=True)
class Around(Router):
    """A router that changes what another one, *router*, says.

    >>> class Doubled(Around):
    ...     def cost(self, request, view):
    ...         return 2 * self.router.cost(request, view)
    """

    router: Router

    def price(self, request: Request, view: View) -> tuple[Floats, tuple[Term, ...]]:
        return self.router.price(request, view)

    def cost(self, request: Request, view: View) -> Floats:
        return self.router.cost(request, view)

    def ended(
        self, request: Request, worker: WorkerId, error: str | None, view: View
    ) -> None:
        self.router.ended(request, worker, error, view)
