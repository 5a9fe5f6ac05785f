"""Pictures of reports, with matplotlib, which is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InvalidRequest
from ..view import Floats
from .report import Report, Slo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BINS = 120
_NAMES = ("ttft", "tpot", "e2e")


def latencies(
    reports: Report | Sequence[Report], slo: Slo | None = None, name: str = "ttft"
) -> Figure:
    """Draw the part of requests that were done within a time, a line a report.

    Args:
        reports: One or several.
        slo: A limit to draw.
        name: `ttft`, `tpot` or `e2e`.
    """
    if name not in _NAMES:
        raise InvalidRequest(f"{name!r} is none of {', '.join(_NAMES)}")
    figure, axes = _axes()
    for report in _many(reports):
        values = np.sort(getattr(report, f"{name}s"))
        values = values[~np.isnan(values)]
        # Requests without the figure never get there, so it ends below one.
        parts = np.arange(1, len(values) + 1) / max(len(report.ids), 1)
        axes.step(values, parts, where="post", label=report.policy)
    limit = getattr(slo, f"{name}_s", float("nan"))
    if limit == limit:
        axes.axvline(limit, color="grey", linestyle=":")
    axes.set(xlabel=f"{name.upper()}, s", ylabel="part of requests", xscale="log")
    axes.legend()
    return figure


def load(report: Report) -> Figure:
    """Draw how many requests each worker held over time."""
    figure, axes = _axes()
    for worker in report.workers:
        rows = np.array([name == worker.id for name in report.worker], dtype=bool)
        times, counts = _held(report.dispatched[rows], report.ended[rows])
        axes.step(times, counts, where="post", label=worker.id, linewidth=0.8)
    axes.set(xlabel="s", ylabel="requests held", title=report.policy)
    axes.legend(fontsize="small", ncols=2)
    return figure


def hit_rate(reports: Report | Sequence[Report]) -> Figure:
    """Draw the part of prompt tokens found in a cache, over time."""
    figure, axes = _axes()
    for report in _many(reports):
        begun = ~np.isnan(report.first)
        if not begun.any():
            continue
        times = report.first[begun]
        edges = np.linspace(times.min(), times.max(), _BINS // 4 + 1)
        total, _ = np.histogram(times, edges, weights=report.prompt_tokens[begun])
        cached, _ = np.histogram(times, edges, weights=report.cached_tokens[begun])
        rate = np.divide(
            cached, total, out=np.full(len(total), np.nan), where=total > 0
        )
        axes.plot((edges[1:] + edges[:-1]) / 2, rate, label=report.policy)
    axes.set(xlabel="s", ylabel="hit rate", ylim=(0, 1))
    axes.legend()
    return figure


def gantt(report: Report) -> Figure:
    """Draw what each worker computed: prompts, tokens, or nothing."""
    figure, axes = _axes()
    start = min([worker.joined_at for worker in report.workers], default=0.0)
    end = max([worker.left_at for worker in report.workers], default=1.0)
    edges = np.linspace(start, max(end, start + 1e-9), _BINS + 1)
    for row, worker in enumerate(report.workers):
        runs = worker.runs if worker.modelled else _union(worker.runs)
        prompts = runs[:, 4] > 0
        below = np.zeros(_BINS)
        for rows, colour in ((prompts, "tab:orange"), (~prompts, "tab:blue")):
            busy = _busy(runs[rows], edges)
            axes.bar(
                edges[:-1],
                busy * 0.9,
                np.diff(edges),
                bottom=row + below * 0.9,
                align="edge",
                color=colour,
                linewidth=0,
            )
            below += busy
    axes.set_yticks(np.arange(len(report.workers)) + 0.45)
    axes.set_yticklabels([worker.id for worker in report.workers])
    axes.set(xlabel="s", title="busy with prompts (orange) or answers alone (blue)")
    return figure


def _axes() -> tuple[Figure, Axes]:
    # Without pyplot nothing global is touched; notebooks show what is returned.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes: Any = figure.add_subplot()
    return figure, axes


def _many(reports: Report | Sequence[Report]) -> Sequence[Report]:
    return [reports] if isinstance(reports, Report) else reports


def _held(begun: Floats, ended: Floats) -> tuple[Floats, Floats]:
    """Return when a count of overlapping intervals changes, and to what."""
    known = ~(np.isnan(begun) | np.isnan(ended))
    times = np.concatenate([begun[known], ended[known]])
    steps = np.repeat([1.0, -1.0], int(known.sum()))
    order = np.argsort(times, kind="stable")
    counts: Floats = np.cumsum(steps[order])
    return times[order], counts


def _union(runs: Floats) -> Floats:
    """Return rows that cover the times that any of *runs* does, apart and in order."""
    merged: list[Floats] = []
    for run in runs[np.argsort(runs[:, 0], kind="stable")]:
        if merged and run[0] <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], run[1])
        else:
            merged.append(run.copy())
    rows: Floats = np.array(merged).reshape(len(merged), runs.shape[1])
    return rows


def _busy(runs: Floats, edges: Floats) -> Floats:
    """Return the part of each bin that *runs* cover, exact by cumulation."""
    if not len(runs):
        return np.zeros(len(edges) - 1)
    starts, ends = runs[:, 0], runs[:, 1]
    done = np.concatenate([[0.0], np.cumsum(ends - starts)])
    before = np.searchsorted(starts, edges, side="right") - 1
    inside = np.clip(edges - starts[before], 0.0, (ends - starts)[before])
    covered = np.where(before < 0, 0.0, done[before] + inside)
    parts: Floats = np.diff(covered) / np.diff(edges)
    return parts
