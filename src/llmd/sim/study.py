"""Policies side by side, on equal arrivals, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import attrs
import numpy as np

from ..errors import InvalidRequest
from ..machines import Machine
from ..types import Worker
from ..view import Floats
from .bootstrap import Interval, interval, mean, percentile_of
from .parallel import spread
from .report import Report, Slo
from .sequence import EngineSettings
from .setting import Policies, Setting, kinds, named
from .tables import html_table, table_lines
from .workload import Workload

_FIGURES = ("ttft", "tpot", "e2e")
_TOGETHER = 2.0


@attrs.frozen(eq=False, repr=False)
class Comparison:
    """Policies on equal arrivals, the first being what others are measured by.

    Attributes:
        reports: For each policy, one report a seed.
        slo: What counts as good.
        same_jobs: The seeds are the same jobs at other times, as of a trace: no
            interval gets narrower by more of them.

    >>> from llmd import LeastLoaded, RoundRobin
    >>> from llmd.sim import workloads
    >>> study = compare([RoundRobin(), LeastLoaded()], workloads.batch(requests=60))
    >>> study.difference("LeastLoaded", "ttft", 90).value < 1.0
    True
    """

    reports: Mapping[str, tuple[Report, ...]]
    slo: Slo
    same_jobs: bool = False

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
        return self._interval(percentile_of(percentile), [self._values(policy, name)])

    def difference(self, policy: str, name: str, percentile: float = 90) -> Interval:
        """Return by how much a percentile differs from the first policy's.

        Both are resampled together, request by request: the arrivals are the
        same, so what they share cancels.
        """
        values = [self._values(p, name) for p in (policy, self.policies[0])]
        of = percentile_of(percentile)
        return self._interval(lambda ours, first: of(ours) - of(first), values)

    def deltas(self, policy: str, name: str) -> Floats:
        """Return for each request by how much `ttft`, `tpot` or `e2e` differs.

        Seconds more than with the first policy, (n,), the seeds one after the
        other; NaN where either gave no such figure.
        """
        ours, first = self._values(policy, name), self._values(self.policies[0], name)
        return ours - first

    def mean_delta(self, policy: str, name: str) -> Interval:
        """Return the mean of `deltas` with its interval."""
        return self._interval(mean, [self.deltas(policy, name)])

    def overloaded(self, policy: str) -> bool:
        """Say whether any run was no steady state."""
        return any(report.overloaded for report in self._of(policy))

    def mean(self, policy: str, name: str) -> float:
        """Return the mean over seeds of a figure of `Report.summary`."""
        summaries = [report.summary() for report in self._of(policy)]
        if name not in summaries[0]:
            raise InvalidRequest(f"{name!r} is none of {', '.join(summaries[0])}")
        return float(np.mean([summary[name] for summary in summaries]))

    def _of(self, policy: str) -> tuple[Report, ...]:
        if policy not in self.reports:
            raise InvalidRequest(f"{policy!r} is none of {', '.join(self.policies)}")
        return self.reports[policy]

    def goodput(self, policy: str) -> float:
        """Return requests a second that kept the SLO, mean over seeds."""
        return float(np.mean([r.goodput(self.slo) for r in self._of(policy)]))

    def _interval(
        self, figure: Callable[..., float], columns: Sequence[Floats]
    ) -> Interval:
        """Resample what hangs together: who was there at the same time, twice over."""
        seeds = len(self.reports[self.policies[0]])
        there = [
            float(np.nansum(report.e2es)) / report.span_s
            for reports in self.reports.values()
            for report in reports
            if report.span_s
        ]
        copies = seeds if self.same_jobs else 1
        return interval(
            figure, columns, stretch=_TOGETHER * max(there, default=0.0), copies=copies
        )

    def _values(self, policy: str, name: str) -> Floats:
        if name not in _FIGURES:
            raise InvalidRequest(f"{name!r} is none of {', '.join(_FIGURES)}")
        columns = [getattr(report, f"{name}s") for report in self._of(policy)]
        return np.concatenate(columns)

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


def compare(
    policies: Policies,
    workload: Workload,
    *,
    seeds: int = 1,
    slo: Slo | None = None,
    workers: int | Iterable[Worker] = 8,
    machine: Machine | None = None,
    machines: Mapping[str, Machine] | None = None,
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
        machines: As for `simulate`.
        settings: As for `simulate`.
        jobs: Processes to spread the runs over.
    """
    setting = Setting(
        policies=named(policies),
        workloads=kinds(workload, seeds),
        workers=workers,
        machine=machine,
        machines=machines,
        settings=settings,
        slo=Slo(ttft_s=2.0, tpot_s=0.05) if slo is None else slo,
    )
    count = len(setting.policies) * seeds
    reports = spread(_compared, setting, count, jobs)
    grouped = {
        policy: tuple(reports[row * seeds : (row + 1) * seeds])
        for row, policy in enumerate(setting.policies)
    }
    same_jobs = seeds > 1 and workload.remake is None
    return Comparison(grouped, setting.slo, same_jobs)


def _compared(setting: Setting, row: int) -> Report:
    policy = [*setting.policies][row // len(setting.workloads)]
    return setting.report(policy, setting.workloads[row % len(setting.workloads)], None)
