"""The highest rate at which a policy keeps a promise."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping

import attrs
import numpy as np

from ..errors import InvalidRequest
from ..machines import Machine
from ..types import Worker
from .face import Policy
from .parallel import spread
from .report import Slo
from .sequence import EngineSettings
from .setting import Policies, Setting, kinds, named
from .workload import Workload

_SUSTAINED = 0.5
"""Part of a rate that has to be answered while requests still come."""


@attrs.frozen(eq=False, repr=False)
class Capacity:
    """The highest rate at which a policy keeps an SLO.

    Attributes:
        policy: Its name.
        slo: What it had to keep.
        rates: Requests a second, one for each seed; 0 where not even the lowest
            of `between` was kept, and where all was kept that was tried, the
            highest of that.
        served: Requests a second that were answered at that rate, of each seed.
            Far less than the rate says that all came in a burst which was over
            before it could saturate anybody: take more requests.
        tried: Of each seed: the rates that were run and whether they met it.
    """

    policy: str
    slo: Slo
    rates: tuple[float, ...]
    served: tuple[float, ...]
    tried: tuple[tuple[tuple[float, bool], ...], ...]

    @property
    def rate(self) -> float:
        """Mean over the seeds, requests a second."""
        return float(np.mean(self.rates))

    @property
    def sustained(self) -> bool:
        """Whether requests were answered about as fast as they came, in all seeds."""
        pairs = zip(self.served, self.rates, strict=True)
        return all(served >= _SUSTAINED * rate for served, rate in pairs)

    @property
    def open(self) -> bool:
        """Whether some search found no rate at which the SLO was not kept."""
        return any(all(kept for _, kept in tried) for tried in self.tried)

    def __repr__(self) -> str:
        parts = [
            self.policy + ":",
            "at least" * self.open,
            f"{self.rate:.4g} requests/s",
        ]
        if len(self.rates) > 1:
            parts.append(f"({min(self.rates):.4g} to {max(self.rates):.4g})")
        if not self.sustained:
            parts.append(f"(a burst: {min(self.served):.4g}/s answered)")
        return " ".join(filter(None, parts))

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
    workers: int | Iterable[Worker] = 8,
    machine: Machine | None = None,
    machines: Mapping[str, Machine] | None = None,
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
        between: Bounds to search in, requests a second; both are tried.
        precision: Part of the rate to which it is found.
        workers: As for `simulate`.
        machine: As for `simulate`.
        machines: As for `simulate`.
        settings: As for `simulate`.
        jobs: Processes to spread the searches over.

    Raises:
        InvalidRequest: Bounds or precision that nothing can be found with.
    """
    if not (0.0 <= between[0] < between[1] and 0.0 < precision < math.inf):
        raise InvalidRequest(f"cannot search {between} to a part of {precision}")
    setting = Setting(
        policies=named(policies),
        workloads=kinds(workload, seeds),
        workers=workers,
        machine=machine,
        machines=machines,
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
            *map(tuple, zip(*found[row * seeds : (row + 1) * seeds], strict=True)),
        )
        for row, policy in enumerate(setting.policies)
    }


def capacity(
    policy: Policy,
    workload: Workload,
    slo: Slo,
    *,
    workers: int | Iterable[Worker] = 8,
    machine: Machine | None = None,
    machines: Mapping[str, Machine] | None = None,
    settings: EngineSettings | None = None,
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
                machines=machines,
                settings=settings,
                precision=precision,
            ).values()
        )
    )


def _searched(
    setting: Setting, row: int
) -> tuple[float, float, tuple[tuple[float, bool], ...]]:
    """Return the rate, what was answered at it, and what was tried."""
    policy = [*setting.policies][row // len(setting.workloads)]
    workload = setting.workloads[row % len(setting.workloads)]
    tried: list[tuple[float, bool]] = []
    served = {0.0: 0.0}

    def meets(rate: float) -> bool:
        report = setting.report(policy, workload.at_rate(rate), setting.slo)
        tried.append((rate, report.meets(setting.slo)))
        served[rate] = report.completed / (report.span_s or math.inf)
        return tried[-1][1]

    def found(rate: float) -> tuple[float, float, tuple[tuple[float, bool], ...]]:
        return rate, served[rate], tuple(tried)

    low, high = setting.range
    if low and not meets(low):
        return found(0.0)
    if high < math.inf and meets(high):
        return found(high)
    rate = max(workload.rate, 2.0 * low) if high == math.inf else high / 2.0
    while not low or high == math.inf:
        if meets(rate):
            low, rate = rate, rate * 2.0
        else:
            high, rate = rate, rate / 2.0
        if not 1e-6 < rate < 1e6:
            return found(low)
    while high > low * (1.0 + setting.precision):
        rate = math.sqrt(low * high)
        if meets(rate):
            low = rate
        else:
            high = rate
    return found(low)
