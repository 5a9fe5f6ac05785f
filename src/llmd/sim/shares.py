"""What each tenant, or each band, got out of a run."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import numpy as np

from ..balancer.accounts import jain
from ..view import Mask
from .bootstrap import percentile_of
from .report import Report
from .tables import html_table, table_lines

_HEAD = ("", "requests", "completed", "tokens", "wait p50", "p99", "TTFT p50", "p99")


@attrs.frozen(kw_only=True)
class Share:
    """Figures of one tenant or band; NaN where nothing of it came that far.

    Attributes:
        requests: That arrived.
        completed: That were answered in full.
        served_tokens: Prompt tokens of what was begun, and tokens of answers.
        wait_p50_s: Median from arrival to the last dispatch.
        wait_p99_s: The 99th percentile of that.
        ttft_p50_s: Median time to first token.
        ttft_p99_s: The 99th percentile of that.
    """

    requests: int
    completed: int
    served_tokens: int
    wait_p50_s: float
    wait_p99_s: float
    ttft_p50_s: float
    ttft_p99_s: float


@attrs.frozen(eq=False, repr=False)
class Shares:
    """What each got, by name, in order of first arrival; shown as a table.

    Attributes:
        by: What tells them apart.
        rows: Figures by name.
    """

    by: str
    rows: dict[str, Share]

    @property
    def jain(self) -> float:
        """Jain's index over served tokens: 1 if all are equal."""
        return jain(share.served_tokens for share in self.rows.values())

    def __getitem__(self, name: str) -> Share:
        return self.rows[name]

    def __repr__(self) -> str:
        lines = table_lines((self.by, *_HEAD[1:]), self._cells())
        return "\n".join([*lines, f"Jain's index {self.jain:.3f}"])

    def _repr_html_(self) -> str:
        table = html_table((self.by, *_HEAD[1:]), self._cells())
        return f"{table}<p>Jain's index {self.jain:.3f}</p>"

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (name, *(f"{value:.4g}" for value in attrs.astuple(share)))
            for name, share in self.rows.items()
        ]


def shares(report: Report, by: str = "tenant") -> Shares:
    """Sum a run up for each tenant, or each priority.

    Args:
        report: Of the run.
        by: "tenant" or "priority".

    Raises:
        ValueError: *by* is neither.

    >>> import llmd
    >>> from llmd.sim import simulate, workloads
    >>> report = simulate(llmd.LeastLoaded(), workloads.batch(requests=20))
    >>> sum(share.completed for share in shares(report).rows.values())
    20
    """
    kinds = {"tenant": report.tenants, "priority": report.priorities}
    if by not in kinds:
        raise ValueError(f"by is {by!r}, must be 'tenant' or 'priority'")
    return Shares(by, dict(_rows(report, tuple([str(each) for each in kinds[by]]))))


def _rows(report: Report, names: tuple[str, ...]) -> Iterable[tuple[str, Share]]:
    of = np.array(names, dtype=object)
    done = np.array(report.status, dtype=object) == "completed"
    begun = ~np.isnan(report.first)
    waited = report.dispatched - report.arrived
    ttfts = report.first - report.arrived
    for name in dict.fromkeys(names):
        mine: Mask = np.asarray(of == name, dtype=bool)
        prompts = int(report.prompt_tokens[mine & begun].sum())
        yield (
            name,
            Share(
                requests=int(mine.sum()),
                completed=int((mine & done).sum()),
                served_tokens=prompts + int(report.output_tokens[mine].sum()),
                wait_p50_s=percentile_of(50)(waited[mine]),
                wait_p99_s=percentile_of(99)(waited[mine]),
                ttft_p50_s=percentile_of(50)(ttfts[mine]),
                ttft_p99_s=percentile_of(99)(ttfts[mine]),
            ),
        )
