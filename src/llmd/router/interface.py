"""The `Router` interface."""

from __future__ import annotations

import abc

import numpy as np

from ..decision import Decision, Term
from ..errors import PolicyError
from ..types import Request, Role
from ..view import Floats, View


class Router(abc.ABC):
    """Chooses a worker for each request.

    Subclasses implement `cost`; those that choose more than one worker
    override `route`.

    >>> class Shortest(Router):
    ...     def cost(self, request, view):
    ...         return view.workers.waiting_requests
    """

    @abc.abstractmethod
    def cost(self, request: Request, view: View) -> Floats:
        """Price each worker for *request*, shape (W,); lower is better.

        Only the order matters, except that infinity rules a worker out.
        The routers here price in seconds, so that costs may be added.
        """

    def price(self, request: Request, view: View) -> tuple[Floats, tuple[Term, ...]]:
        """Return the cost and the terms that explain it."""
        return self.cost(request, view), ()

    def pick(self, request: Request, view: View) -> Decision | None:
        """Decide for a cheapest worker of *view*, ties broken by `view.rng`.

        Returns:
            None if every worker is ruled out.

        Raises:
            PolicyError: `cost` gave a wrong shape or a NaN.
        """
        priced, terms = self.price(request, view)
        costs = np.asarray(priced, dtype=np.float64)
        ids = view.workers.ids
        if costs.shape != (len(ids),):
            raise PolicyError(
                f"{self!r} priced {len(ids)} workers with an array of shape"
                f" {costs.shape}"
            )
        if not len(ids):
            return None
        row = int(costs.argmin())
        lowest = costs[row]
        if lowest != lowest:  # argmin gives the first NaN if there is one
            raise PolicyError(f"{self!r} priced {ids[row]!r} at NaN")
        if lowest == np.inf:
            return None
        ties = np.flatnonzero(costs == lowest)
        if len(ties) > 1:
            row = int(ties[view.rng.integers(len(ties))])
        return Decision(
            decode=ids[row], candidates=ids, costs=costs, terms=terms, tied=len(ties)
        )

    def route(self, request: Request, view: View) -> Decision | None:
        """Choose among the workers of *view*, all ready and with room.

        Only workers able to do both prefill and decode are considered here.

        Returns:
            None to leave the request waiting.
        """
        return self.pick(request, view.only(view.workers.able(Role.BOTH)))


class TermRouter(Router):
    """A router whose cost is a sum of terms, which then explain it."""

    @abc.abstractmethod
    def terms(self, request: Request, view: View) -> tuple[Term, ...]:
        """Return what to add up: each term's value times its weight, (W,)."""

    def price(self, request: Request, view: View) -> tuple[Floats, tuple[Term, ...]]:
        terms = self.terms(request, view)
        costs: Floats = np.zeros(len(view.workers), dtype=np.float64)
        for term in terms:
            costs += term.weight * term.value
        return costs, terms

    def cost(self, request: Request, view: View) -> Floats:
        return self.price(request, view)[0]
