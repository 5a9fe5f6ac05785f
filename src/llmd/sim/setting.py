"""What all runs of a study have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import attrs

from ..amounts import as_whole
from ..errors import InvalidRequest, shown
from ..machines import Machine
from ..types import Worker
from .face import Policy, simulate
from .report import Report, Slo
from .sequence import EngineSettings
from .tables import name_of
from .workload import Workload

Policies: TypeAlias = Mapping[str, Policy] | Sequence[Policy]


def _kept(workers: int | Iterable[Worker]) -> int | Iterable[Worker]:
    """Return *workers*, which may be iterated over again and again."""
    return tuple(workers) if isinstance(workers, Iterable) else workers


@attrs.frozen(kw_only=True)
class Setting:
    """Policies by name, workloads by seed, and the fleet they run on.

    Attributes:
        policies: By name.
        workloads: One for each seed.
        workers: As for `simulate`, like the next three.
        machine: Step times.
        machines: By name.
        settings: How engines schedule.
        slo: What counts as good, or must be kept.
        precision: Part of a rate to which a search goes.
        range: Rates to search between.
    """

    policies: Mapping[str, Policy]
    workloads: tuple[Workload, ...]
    workers: int | Iterable[Worker] = attrs.field(converter=_kept)
    machine: Machine | None
    machines: Mapping[str, Machine] | None
    settings: EngineSettings | None
    slo: Slo = attrs.field()
    precision: float = 0.02
    range: tuple[float, float] = (0.0, math.inf)

    @slo.validator
    def _is_one(self, _: object, slo: object) -> None:
        if not isinstance(slo, Slo):
            raise InvalidRequest(f"slo is {shown(slo)}, want an Slo")

    def report(
        self, policy: str, workload: Workload, give_up: Slo | None = None
    ) -> Report:
        """Run one policy on one workload."""
        report = simulate(
            self.policies[policy],
            workload,
            workers=self.workers,
            machine=self.machine,
            machines=self.machines,
            settings=self.settings,
            give_up=give_up,
        )
        return attrs.evolve(report, policy=policy)


def named(policies: Policies) -> Mapping[str, Policy]:
    """Return *policies* by name.

    Raises:
        InvalidRequest: There is none, two have one name, or a name is no text.
    """
    if not isinstance(policies, (Mapping, Sequence)):
        raise InvalidRequest(f"{policies!r}: pass policies in a list, or by name")
    if not policies:
        raise InvalidRequest("no policy to compare")
    if isinstance(policies, Mapping):
        odd = [name for name in policies if not isinstance(name, str)]
        if odd:
            raise InvalidRequest(f"policies are called {odd[:3]}: want texts")
        return policies
    names = [name_of(policy) for policy in policies]
    if len(set(names)) < len(names):
        raise InvalidRequest("two policies have one name: pass them in a dict")
    return dict(zip(names, policies, strict=True))


def kinds(workload: Workload, seeds: int) -> tuple[Workload, ...]:
    """Return *workload*, or one of its kind for each seed."""
    count = as_whole(seeds)
    if count is None or count < 1:
        raise InvalidRequest(f"seeds is {shown(seeds)}, must be how many")
    if seeds == 1:
        return (workload,)
    return tuple([workload.seeded(seed) for seed in range(count)])
