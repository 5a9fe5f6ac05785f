"""What a run came to: latencies, rates and balance, for people and programs."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from ..amounts import as_real
from ..errors import InvalidRequest, shown
from ..types import WorkerId
from ..view import Floats, Ints, Mask
from .bootstrap import percentile_of
from .load import NO_RUNS, WorkerLoad
from .tables import html_table, name_of, table_lines

if TYPE_CHECKING:
    from .outcome import Outcome
    from .simulator import Simulator
    from .workload import Workload


@attrs.frozen(kw_only=True)
class Slo:
    """What a request must keep to count as good; NaN asks for nothing.

    Attributes:
        ttft_s: Time to first token, at most.
        tpot_s: Mean time per later token, at most.
        e2e_s: Time to the end, at most.
        attainment: Part of all requests that must keep each of them.

    >>> Slo(ttft_s=2.0, tpot_s=0.05).attainment
    0.9
    """

    ttft_s: float = math.nan
    tpot_s: float = math.nan
    e2e_s: float = math.nan
    attainment: float = 0.9

    def __attrs_post_init__(self) -> None:
        if not 0.0 < self.attainment <= 1.0:
            raise InvalidRequest(f"attainment is {self.attainment}, want (0, 1]")
        if any(bound <= 0.0 for bound in (self.ttft_s, self.tpot_s, self.e2e_s)):
            raise InvalidRequest(f"{self!r} cannot be kept")


@attrs.frozen(kw_only=True, eq=False, repr=False)
class Report:
    """The outcome of a run, one row a request, shape (n,) each.

    Times are seconds, NaN for what never happened; requests that were refused
    or never ended count as misses of every SLO.

    Attributes:
        policy: Name of what routed.
        workload: Name of what arrived.
        ids: Request ids in order of the workload.
        tenants: Whose each was; *priorities* likewise.
        arrived: When each arrived.
        dispatched: When it was last sent to a worker.
        first: When its answer began.
        ended: When it ended, however.
        prompt_tokens: Length of its prompt.
        cached_tokens: How much of it was found in a cache.
        output_tokens: Length of its answer as it came.
        worker: Who answered; empty if nobody.
        status: `completed`, or in words why not; empty if the run ended before it.
        workers: What each worker did.
        span_s: Seconds from the first arrival to the last event.

    >>> from llmd import LeastLoaded
    >>> from llmd.sim import simulate, workloads
    >>> report = simulate(LeastLoaded(), workloads.dialogue(rate=4.0, requests=50))
    >>> report.completed, 0 < report.ttft(50) < 1, report.goodput(Slo(ttft_s=9.0)) > 0.1
    (50, True, True)
    """

    policy: str
    workload: str
    ids: tuple[str, ...]
    tenants: tuple[str, ...]
    priorities: Ints
    arrived: Floats
    dispatched: Floats
    first: Floats
    ended: Floats
    prompt_tokens: Ints
    cached_tokens: Ints
    output_tokens: Ints
    worker: tuple[WorkerId, ...]
    status: tuple[str, ...]
    workers: tuple[WorkerLoad, ...]
    span_s: float

    @classmethod
    def of(cls, simulator: Simulator, workload: Workload) -> Report:
        """Read the report of a run that has ended."""
        outcomes = [*simulator.ledger.outcomes.values()]
        engines = simulator.engines.values()
        ends = [engine.model.log[-1][1] for engine in engines if engine.model.log]
        end = max([o.ended for o in outcomes if o.ended == o.ended] + ends, default=0)
        loads = tuple(
            WorkerLoad.of(engine.model, engine.joined_at, min(engine.left_at, end))
            for engine in engines
        )
        router = simulator.cluster.router
        return cls.from_outcomes(outcomes, router, workload.name, loads)

    @classmethod
    def from_outcomes(
        cls,
        outcomes: Sequence[Outcome],
        policy: object,
        workload: str,
        workers: tuple[WorkerLoad, ...],
    ) -> Report:
        """Make a report of what became of each request."""
        start = min([o.arrived for o in outcomes if o.arrived == o.arrived], default=0)
        ends = [o.ended for o in outcomes if o.ended == o.ended]
        ends += [float(load.runs[-1, 1]) for load in workers if len(load.runs)]
        return cls(
            policy=name_of(policy),
            workload=workload,
            workers=workers,
            span_s=max(ends, default=0.0) - start,
            **_columns(outcomes),
        )

    @property
    def done(self) -> Mask:
        """Which requests were answered in full, shape (n,)."""
        return np.array([status == "completed" for status in self.status], dtype=bool)

    @property
    def completed(self) -> int:
        """Requests answered in full."""
        return int(self.done.sum())

    @property
    def ttfts(self) -> Floats:
        """Time to first token of each request, shape (n,)."""
        return self.first - self.arrived

    @property
    def tpots(self) -> Floats:
        """Mean time per token after the first, shape (n,); NaN below two."""
        later = np.where(self.output_tokens > 1, self.output_tokens - 1, 1)
        tpots: Floats = (self.ended - self.first) / later
        return np.where(self.done & (self.output_tokens > 1), tpots, np.nan)

    @property
    def e2es(self) -> Floats:
        """Time to the end of each answer in full, shape (n,)."""
        return np.where(self.done, self.ended - self.arrived, np.nan)

    @property
    def queue_s(self) -> Floats:
        """Time each request waited for a worker, shape (n,)."""
        return self.dispatched - self.arrived

    def ttft(self, percentile: float) -> float:
        """Return a percentile of the times to first token."""
        return percentile_of(percentile)(self.ttfts)

    def tpot(self, percentile: float) -> float:
        """Return a percentile, over requests, of the times per token."""
        return percentile_of(percentile)(self.tpots)

    def e2e(self, percentile: float) -> float:
        """Return a percentile of the times to the end."""
        return percentile_of(percentile)(self.e2es)

    def itl(self, percentile: float) -> float:
        """Return a percentile of single gaps between tokens.

        A request that was thrown out and computed again has one gap, of all
        that time, which counts in TPOT and not here.
        """
        if not 0.0 <= as_real(percentile) <= 100.0:
            raise InvalidRequest(f"there is no percentile {shown(percentile)}")
        runs = np.concatenate([load.runs for load in self.workers] or [NO_RUNS])
        gaps = (runs[:, 1] - runs[:, 0]) / np.maximum(runs[:, 2], 1)
        weights = runs[:, 2] * runs[:, 3]
        order = np.argsort(gaps, kind="stable")
        reached = np.cumsum(weights[order])
        if not len(reached) or reached[-1] <= 0:
            return math.nan
        at = np.searchsorted(reached, percentile / 100.0 * reached[-1])
        return float(gaps[order][min(int(at), len(gaps) - 1)])

    def good(self, slo: Slo) -> Mask:
        """Say which requests kept all of *slo*, shape (n,)."""
        kept = self.done
        if slo.ttft_s == slo.ttft_s:
            kept = kept & (self.ttfts <= slo.ttft_s)
        if slo.tpot_s == slo.tpot_s:
            # An answer of one token has no later token to be late.
            kept = kept & ~(self.tpots > slo.tpot_s)
        if slo.e2e_s == slo.e2e_s:
            kept = kept & (self.e2es <= slo.e2e_s)
        return kept

    def goodput(self, slo: Slo) -> float:
        """Return requests a second that kept all of *slo*."""
        return float(self.good(slo).sum() / self.span_s) if self.span_s else 0.0

    def meets(self, slo: Slo) -> bool:
        """Say whether each part of *slo* is kept by enough of all requests."""
        if not self.ids:
            return True
        parts = [
            attrs.evolve(Slo(attainment=slo.attainment), **{name: bound})
            for name in ("ttft_s", "tpot_s", "e2e_s")
            if (bound := getattr(slo, name)) == bound
        ]
        return all(self.good(part).mean() >= slo.attainment for part in parts)

    @property
    def hit_rate(self) -> float:
        """Part of all prompt tokens, of requests that got an answer, cached."""
        begun = ~np.isnan(self.first)
        total = self.prompt_tokens[begun].sum()
        return float(self.cached_tokens[begun].sum() / total) if total else 0.0

    @property
    def throughput(self) -> float:
        """Output tokens a second."""
        return float(self.output_tokens.sum() / self.span_s) if self.span_s else 0.0

    @property
    def utilisation(self) -> float:
        """Part of the workers' time spent in steps."""
        alive = sum([load.left_at - load.joined_at for load in self.workers])
        return sum([load.busy_s for load in self.workers]) / alive if alive else 0.0

    @property
    def imbalance(self) -> float:
        """Busy seconds of the busiest worker over the mean; 1 is even."""
        busy = [load.busy_s for load in self.workers]
        mean = sum(busy) / len(busy) if busy else 0.0
        return max(busy) / mean if mean else 1.0

    @property
    def worker_hours(self) -> float:
        """Hours that workers were there."""
        return sum([load.left_at - load.joined_at for load in self.workers]) / 3600.0

    @property
    def preemptions(self) -> int:
        """Requests thrown out of a batch for want of blocks."""
        return sum([load.preemptions for load in self.workers])

    @property
    def overloaded(self) -> bool:
        """Whether waits still grew when arrivals ended: not a steady state.

        True if the median wait of the last quarter of arrivals is half as
        long again as that of the second quarter and longer by a second (waits
        that grow without bound make it 7/3 as long), or if a twentieth of all
        requests got no full answer.
        """
        if not len(self.ids) or self.done.mean() < 0.95:
            return True
        waits = self.ttfts[np.argsort(self.arrived, kind="stable")]
        quarter = max(len(waits) // 4, 1)
        early = percentile_of(50)(waits[quarter : 2 * quarter])
        late = percentile_of(50)(waits[-quarter:])
        return late > 1.5 * early and late > early + 1.0

    def summary(self) -> dict[str, float]:
        """Return the figures by name, seconds and parts."""
        figures: dict[str, float] = {"requests": len(self.ids)}
        figures["completed"] = self.completed
        for name in ("ttft", "tpot", "itl", "e2e"):
            for percentile in (50, 90, 99):
                figures[f"{name}_p{percentile}_s"] = getattr(self, name)(percentile)
        figures["requests_per_s"] = self.completed / self.span_s if self.span_s else 0.0
        figures["output_tokens_per_s"] = self.throughput
        for name in ("hit_rate", "utilisation", "imbalance", "worker_hours"):
            figures[name] = getattr(self, name)
        figures["queue_p90_s"] = percentile_of(90)(self.queue_s)
        figures["preemptions"] = self.preemptions
        return figures

    def table(self) -> dict[str, Any]:
        """Return one column a figure and one row a request.

        `pandas.DataFrame(report.table())` and `polars.DataFrame(report.table())`
        both take it.
        """
        times = ("arrived", "dispatched", "first", "ended")
        sizes = ("prompt_tokens", "cached_tokens", "output_tokens")
        table: dict[str, Any] = {"id": self.ids, "tenant": self.tenants}
        table["priority"] = self.priorities
        table |= {
            name: getattr(self, name) for name in (*times, *sizes, "worker", "status")
        }
        table |= {"ttft_s": self.ttfts, "tpot_s": self.tpots, "e2e_s": self.e2es}
        return {
            name: column if isinstance(column, np.ndarray) else [*column]
            for name, column in table.items()
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the figures and the table as JSON, and write them to *path*."""
        document = {
            "policy": self.policy,
            "workload": self.workload,
            "overloaded": self.overloaded,
            "summary": {name: _number(v) for name, v in self.summary().items()},
            "requests": {
                name: [_number(value) for value in column]
                for name, column in self.table().items()
            },
        }
        text = json.dumps(document, allow_nan=False)
        if path is not None:
            Path(path).write_text(text)
        return text

    def __repr__(self) -> str:
        label = " (overload)" if self.overloaded else ""
        lines = [f"{self.policy} on {self.workload}{label}"]
        return "\n".join([*lines, *table_lines(*self._grid())])

    def _repr_html_(self) -> str:
        label = " <b>overload</b>" if self.overloaded else ""
        title = f"{html.escape(self.policy)} on {html.escape(self.workload)}{label}"
        return f"<p>{title}</p>{html_table(*self._grid())}"

    def _grid(self) -> tuple[list[str], list[list[str]]]:
        figures = self.summary()
        rows = [[name, f"{value:.4g}"] for name, value in figures.items()]
        return ["figure", "value"], rows


def _columns(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    rows = [*outcomes]
    columns: dict[str, Any] = {"ids": tuple([o.job.id for o in rows])}
    for name in ("arrived", "dispatched", "first", "ended"):
        columns[name] = np.array([getattr(o, name) for o in rows], dtype=np.float64)
    counts = {
        "priorities": [o.job.request.priority for o in rows],
        "prompt_tokens": [o.job.request.prompt_tokens for o in rows],
        "cached_tokens": [o.cached_tokens for o in rows],
        "output_tokens": [o.generated for o in rows],
    }
    for name, values in counts.items():
        columns[name] = np.array(values, dtype=np.int64)
    columns["tenants"] = tuple([o.job.request.tenant for o in rows])
    columns["worker"] = tuple([o.worker for o in rows])
    columns["status"] = tuple([o.status for o in rows])
    return columns


def _number(value: Any) -> Any:
    """Return what JSON can carry."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
