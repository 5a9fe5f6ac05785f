"""The highest rate at which a policy keeps a promise."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import attrs
import numpy as np

from ..machines import Machine
from ..types import Worker
from .face import Policy
from .parallel import spread
from .report import Slo
from .sequence import EngineSettings
from .setting import Policies, Setting, kinds, named
from .workload import Workload


@attrs.frozen(eq=False, repr=False)
class Capacity:
    """The highest rate at which a policy keeps an SLO.

    Attributes:
        policy: Its name.
        slo: What it had to keep.
        rates: Requests a second, one for each seed.
        tried: Of each seed: the rates that were run and whether they met it.
    """

    policy: str
    slo: Slo
    rates: tuple[float, ...]
    tried: tuple[tuple[tuple[float, bool], ...], ...]

    @property
    def rate(self) -> float:
        """Mean over the seeds, requests a second."""
        return float(np.mean(self.rates))

    def __repr__(self) -> str:
        spread_of = f" ({min(self.rates):.4g} to {max(self.rates):.4g})"
        return f"{self.policy}: {self.rate:.4g} requests/s" + (
            spread_of if len(self.rates) > 1 else ""
        )

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>"


def capacities(
    policies: Policies,
    workload: Workload,
    slo: Slo,
    *,
    seeds: int = 1,
    between: tuple[float, float] = (0.0, math.inf),
    precision: float = 0.02,
    workers: int | Sequence[Worker] = 8,
    machine: Machine | None = None,
    settings: EngineSettings | None = None,
    jobs: int = 1,
) -> dict[str, Capacity]:
    """Find for each policy the highest rate that meets *slo*, by bisection.

    Requests that were refused or never ended miss the SLO.  A run is given up
    as soon as too many have missed.

    Args:
        policies: By name, or in a list.
        workload: Whose arrivals are stretched.
        slo: What must be kept.
        seeds: Workloads of the kind to find it for, paired between policies.
        between: Bounds to search in, requests a second.
        precision: Part of the rate to which it is found.
        workers: As for `simulate`.
        machine: As for `simulate`.
        settings: As for `simulate`.
        jobs: Processes to spread the searches over.
    """
    setting = Setting(
        policies=named(policies),
        workloads=kinds(workload, seeds),
        workers=workers,
        machine=machine,
        settings=settings,
        slo=slo,
        precision=precision,
        range=between,
    )
    found = spread(_searched, setting, len(setting.policies) * seeds, jobs)
    return {
        policy: Capacity(
            policy,
            slo,
            tuple([rate for rate, _ in found[row * seeds : (row + 1) * seeds]]),
            tuple([tried for _, tried in found[row * seeds : (row + 1) * seeds]]),
        )
        for row, policy in enumerate(setting.policies)
    }


def capacity(
    policy: Policy,
    workload: Workload,
    slo: Slo,
    *,
    workers: int | Sequence[Worker] = 8,
    machine: Machine | None = None,
    precision: float = 0.02,
) -> Capacity:
    """Find the highest rate at which *policy* meets *slo*; see `capacities`.

    >>> from llmd import LeastLoaded
    >>> from llmd.sim import Slo, workloads
    >>> load = workloads.batch(requests=100)
    >>> found = capacity(LeastLoaded(), load, Slo(ttft_s=0.05), workers=1)
    >>> found.rate > 1
    True
    """
    return next(
        iter(
            capacities(
                [policy],
                workload,
                slo,
                workers=workers,
                machine=machine,
                precision=precision,
            ).values()
        )
    )


def _searched(
    setting: Setting, row: int
) -> tuple[float, tuple[tuple[float, bool], ...]]:
    policy = [*setting.policies][row // len(setting.workloads)]
    workload = setting.workloads[row % len(setting.workloads)]
    tried: list[tuple[float, bool]] = []

    def meets(rate: float) -> bool:
        report = setting.report(policy, workload.at_rate(rate), setting.slo)
        tried.append((rate, report.meets(setting.slo)))
        return tried[-1][1]

    low, high = setting.range
    rate = max(workload.rate, low) if high == math.inf else math.sqrt(low * high)
    while not low or high == math.inf:
        if meets(rate):
            low, rate = rate, rate * 2.0
        else:
            high, rate = rate, rate / 2.0
        if not 1e-6 < rate < 1e6:
            return low, tuple(tried)
    while high > low * (1.0 + setting.precision):
        rate = math.sqrt(low * high)
        if meets(rate):
            low = rate
        else:
            high = rate
    return low, tuple(tried)
