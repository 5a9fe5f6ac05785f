"""Routers that leave something to chance, drawn from `view.rng`."""

from __future__ import annotations

import attrs
import numpy as np

from ..decision import Decision
from ..errors import PolicyError
from ..types import Request
from ..view import Floats, View
from .interface import Around, Router
from .simple import Random


@attrs.define(kw_only=True)
class Softmax(Around):
    """Draws a worker, the cheaper the likelier: p ~ exp(-cost / temperature).

    Several routers that decide on equal, slightly old loads do not all run to
    the same worker then.

    Attributes:
        temperature: In the unit of the costs, above 0.
        relative: It is a part of the range of the costs instead, as in
            Dynamo's `softmax_sample` (lib/kv-router/src/scheduling/selector).

    >>> Softmax(router=Random(), temperature=0.1).relative
    False
    """

    temperature: float
    relative: bool = False

    def __attrs_post_init__(self) -> None:
        if not self.temperature > 0:
            raise PolicyError(f"temperature {self.temperature} is not above 0")

    def chances(self, costs: Floats) -> Floats:
        """Return the probability of each worker, (W,)."""
        above = costs - costs.min()
        scale = self.temperature
        if self.relative:
            spread = above[np.isfinite(above)].max()
            scale *= spread if spread > 0 else 1.0
        weights: Floats = np.exp(-above / scale)
        weights /= weights.sum()
        return weights

    def choose(self, costs: Floats, view: View) -> tuple[int, int]:
        return int(view.rng.choice(len(costs), p=self.chances(costs))), 1


@attrs.define(kw_only=True)
class Explore(Around):
    """Asks *otherwise* once in a while, to learn what the router never tries.

    Attributes:
        epsilon: How often, in [0, 1].
        otherwise: Asked then.

    >>> Explore(router=Random(), epsilon=0.05).otherwise
    Random()
    """

    epsilon: float
    otherwise: Router = attrs.field(factory=Random)

    def pick(self, request: Request, view: View) -> Decision | None:
        if view.rng.random() >= self.epsilon:
            return self.router.pick(request, view)
        # Somewhere the router itself allows: what it rules out stays out.
        allowed = np.isfinite(np.asarray(self.router.cost(request, view)))
        decision = self.otherwise.pick(request, view.only(allowed))
        if decision is None:
            return None
        return attrs.evolve(decision, notes=(*decision.notes, "explored"))
