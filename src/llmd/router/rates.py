"""The machines of a fleet as one machine with arrays for rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from ..machines import Machine
from ..types import Tier
from ..view import Floats, Ints, Workers


@attrs.frozen(eq=False)
class Rates:
    """Step times of every worker, by the name of its machine.

    Attributes:
        default: For workers whose machine is unnamed or not in *machines*.
        machines: By the name that `Worker.machine` gives.

    >>> from llmd.machines import H100, Machine
    >>> Rates(Machine(), {}).machines
    {}
    """

    default: Machine
    machines: Mapping[str, Machine]
    _profiles: tuple[Machine, ...] = attrs.field(init=False)
    _columns: dict[str, Floats] = attrs.field(init=False)
    _loads: Floats = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        profiles = (self.default, *self.machines.values())
        names = [
            field.name
            for field in attrs.fields(Machine)
            if isinstance(getattr(self.default, field.name), (int, float))
        ]
        columns = {
            name: np.array([getattr(profile, name) for profile in profiles], np.float64)
            for name in names
        }
        loads = [[m.load_s_per_token(tier) for tier in Tier] for m in profiles]
        object.__setattr__(self, "_profiles", profiles)
        object.__setattr__(self, "_columns", columns)
        object.__setattr__(self, "_loads", np.array(loads, np.float64))

    def of(self, workers: Workers) -> Machine:
        """Return the machine of *workers*: its rates are (W,) if they differ."""
        if len(self._profiles) == 1:
            return self.default
        kinds = workers.derived(self, _kinds)
        if not len(kinds) or (kinds == kinds[0]).all():
            return self._profiles[int(kinds[0]) if len(kinds) else 0]
        rates: dict[str, Any] = {n: c[kinds] for n, c in self._columns.items()}
        return attrs.evolve(self.default, **rates)

    def load_s(self, held: Ints, workers: Workers) -> Floats:
        """Return the seconds to load what lies in slower tiers, shape (W,).

        Args:
            held: Tokens in each tier or a faster one, shape (W, tiers).
            workers: Of the rows of *held*.
        """
        tokens = np.diff(held, axis=1, prepend=0)
        tokens[:, Tier.GPU] = 0
        seconds: Floats = (tokens * self._load_s_per_token(workers)).sum(axis=1)
        return seconds

    def _load_s_per_token(self, workers: Workers) -> Floats:
        """Return the seconds to load a token from each tier, (W, tiers)."""
        if len(self._profiles) == 1:
            return self._loads
        loads: Floats = self._loads[workers.derived(self, _kinds)]
        return loads


def _kinds(workers: Workers, rates: Rates) -> NDArray[np.intp]:
    """Return the number of each worker's profile, (W,)."""
    numbers = {name: row for row, name in enumerate(rates.machines, start=1)}
    return np.array([numbers.get(w.machine, 0) for w in workers.facts], dtype=np.intp)
