"""Policies side by side: paired runs with intervals, and capacities."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import attrs
import numpy as np

from ..errors import InvalidRequest
from ..machines import Machine
from ..types import Worker
from ..view import Floats, Ints
from .face import Policy, simulate
from .parallel import spread
from .report import Report, Slo, html_table, table_lines
from .sequence import EngineSettings
from .workload import Workload

Policies: TypeAlias = Mapping[str, Policy] | Sequence[Policy]

_RESAMPLES = 400
_BLOCKS = 50


@attrs.frozen(kw_only=True)
class _Setting:
    """What every run of a study has in common."""

    policies: Mapping[str, Policy]
    workloads: tuple[Workload, ...]
    workers: int | Sequence[Worker]
    machine: Machine | None
    settings: EngineSettings | None
    slo: Slo = attrs.field(factory=Slo)
    precision: float = 0.02
    range: tuple[float, float] = (0.0, math.inf)

    def report(self, policy: str, workload: Workload, give_up: Slo | None) -> Report:
        report = simulate(
            self.policies[policy],
            workload,
            workers=self.workers,
            machine=self.machine,
            settings=self.settings,
            give_up=give_up,
        )
        return attrs.evolve(report, policy=policy)


@attrs.frozen
class Interval:
    """A figure and where it lies with 95 % confidence.

    >>> str(Interval(1.0, 0.9, 1.25))
    '1 [0.9, 1.25]'
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@attrs.frozen(eq=False, repr=False)
class Comparison:
    """Policies on equal arrivals, the first being what others are measured by.

    Attributes:
        reports: For each policy, one report a seed.
        slo: What counts as good.

    >>> from llmd import LeastLoaded, RoundRobin
    >>> from llmd.sim import workloads
    >>> study = compare([RoundRobin(), LeastLoaded()], workloads.batch(requests=60))
    >>> study.difference("LeastLoaded()", "ttft", 90).value < 1.0
    True
    """

    reports: Mapping[str, tuple[Report, ...]]
    slo: Slo

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the policies."""
        return tuple(self.reports)

    def figure(self, policy: str, name: str, percentile: float = 90) -> Interval:
        """Return a percentile of `ttft`, `tpot` or `e2e` with its interval.

        It is taken over the requests of all seeds; the interval comes from
        resampling whole stretches of arrivals, since neighbours in time share
        their luck (block bootstrap; Kuensch, 1989).
        """
        return self._interval([self._values(policy, name)], percentile)

    def difference(self, policy: str, name: str, percentile: float = 90) -> Interval:
        """Return by how much a percentile differs from the first policy's.

        Both are resampled together, request by request: the arrivals are the
        same, so what they share cancels.
        """
        values = [self._values(p, name) for p in (policy, self.policies[0])]
        return self._interval(values, percentile)

    def overloaded(self, policy: str) -> bool:
        """Say whether any run was no steady state."""
        return any(report.overloaded for report in self.reports[policy])

    def mean(self, policy: str, name: str) -> float:
        """Return the mean over seeds of a figure of `Report.summary`."""
        figures = [report.summary()[name] for report in self.reports[policy]]
        return float(np.mean(figures))

    def goodput(self, policy: str) -> float:
        """Return requests a second that kept the SLO, mean over seeds."""
        return float(np.mean([r.goodput(self.slo) for r in self.reports[policy]]))

    def _values(self, policy: str, name: str) -> Floats:
        columns = [getattr(report, f"{name}s") for report in self.reports[policy]]
        return np.concatenate(columns)

    def _interval(self, values: Sequence[Floats], percentile: float) -> Interval:
        rng = np.random.default_rng(0)
        size = len(values[0])
        drawn = [
            _spread_of(values, percentile, _blocks(size, rng))
            for _ in range(_RESAMPLES)
        ]
        known = [value for value in drawn if value == value]
        low, high = np.percentile(known, [2.5, 97.5]) if known else (math.nan, math.nan)
        all_rows = np.arange(size)
        value = _spread_of(values, percentile, all_rows)
        return Interval(value, float(low), float(high))

    def _grid(self) -> tuple[list[str], list[list[str]]]:
        head = ["policy", "TTFT p50 s", "TTFT p90 s", "vs first", "TPOT p90 s"]
        head += ["goodput/s", "hit rate", "imbalance", ""]
        return head, [self._row(policy) for policy in self.policies]

    def _row(self, policy: str) -> list[str]:
        first = policy == self.policies[0]
        versus = "" if first else str(self.difference(policy, "ttft"))
        return [
            policy,
            f"{self.figure(policy, 'ttft', 50).value:.3g}",
            str(self.figure(policy, "ttft")),
            versus,
            f"{self.figure(policy, 'tpot').value:.3g}",
            f"{self.goodput(policy):.3g}",
            f"{self.mean(policy, 'hit_rate'):.3f}",
            f"{self.mean(policy, 'imbalance'):.2f}",
            "overload" if self.overloaded(policy) else "",
        ]

    def __repr__(self) -> str:
        return "\n".join(table_lines(*self._grid()))

    def _repr_html_(self) -> str:
        return html_table(*self._grid())


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


def compare(
    policies: Policies,
    workload: Workload,
    *,
    seeds: int = 1,
    slo: Slo | None = None,
    workers: int | Sequence[Worker] = 8,
    machine: Machine | None = None,
    settings: EngineSettings | None = None,
    jobs: int = 1,
) -> Comparison:
    """Run each policy on the same arrivals.

    Args:
        policies: By name, or in a list; the first is the yardstick.
        workload: What arrives; for more than one seed, others of its kind.
        seeds: How many of them.
        slo: What counts as good.
        workers: As for `simulate`.
        machine: As for `simulate`.
        settings: As for `simulate`.
        jobs: Processes to spread the runs over.
    """
    setting = _Setting(
        policies=_named(policies),
        workloads=_kinds(workload, seeds),
        workers=workers,
        machine=machine,
        settings=settings,
        slo=slo or Slo(ttft_s=2.0, tpot_s=0.05),
    )
    count = len(setting.policies) * seeds
    reports = spread(_compared, setting, count, jobs)
    grouped = {
        policy: tuple(reports[row * seeds : (row + 1) * seeds])
        for row, policy in enumerate(setting.policies)
    }
    return Comparison(grouped, setting.slo)


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
    setting = _Setting(
        policies=_named(policies),
        workloads=_kinds(workload, seeds),
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


def _compared(setting: _Setting, row: int) -> Report:
    policy = [*setting.policies][row // len(setting.workloads)]
    return setting.report(policy, setting.workloads[row % len(setting.workloads)], None)


def _searched(
    setting: _Setting, row: int
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


def _named(policies: Policies) -> Mapping[str, Policy]:
    if isinstance(policies, Mapping):
        return policies
    names = [repr(policy) for policy in policies]
    if len(set(names)) < len(names):
        raise InvalidRequest("two policies have one name: pass them in a dict")
    return dict(zip(names, policies, strict=True))


def _kinds(workload: Workload, seeds: int) -> tuple[Workload, ...]:
    if seeds == 1:
        return (workload,)
    return tuple([workload.seeded(seed) for seed in range(seeds)])


def _spread_of(values: Sequence[Floats], percentile: float, rows: Ints) -> float:
    """Return a percentile of the first, less that of the second if given."""
    picked = [column[rows] for column in values]
    known = [column[~np.isnan(column)] for column in picked]
    if not all(len(column) for column in known):
        return math.nan
    figures = [float(np.percentile(column, percentile)) for column in known]
    return figures[0] - figures[1] if len(figures) > 1 else figures[0]


def _blocks(size: int, rng: np.random.Generator) -> Ints:
    """Draw rows in stretches of a fiftieth, as many as there are."""
    length = max(size // _BLOCKS, 1)
    starts = rng.integers(max(size - length, 0) + 1, size=-(-size // length))
    rows: Ints = (starts[:, None] + np.arange(length)).ravel()[:size]
    return rows
