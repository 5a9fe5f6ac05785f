"""Reports as llm-d's Benchmark Report, to lie beside those of other tools.

Version 0.2 of the schema, as in `schema_v0_2.py` of the PyPI package
`llmd-benchmark-report`, which validates it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from ..view import Floats
from .report import Report

VERSION = "0.2"
_PERCENTILES = {
    "p0p1": 0.1,
    "p1": 1,
    "p5": 5,
    "p10": 10,
    "p25": 25,
    "p50": 50,
    "p75": 75,
    "p90": 90,
    "p95": 95,
    "p99": 99,
    "p99p9": 99.9,
}


def benchmark_report(report: Report, tool: str = "llmd.sim") -> dict[str, Any]:
    """Return *report* as a document of the schema, for `json.dump`.

    Args:
        report: Of a simulated or a live run.
        tool: What made the load; `llmd.loadgen` for a live one.

    >>> from llmd import LeastLoaded
    >>> from llmd.sim import simulate, workloads
    >>> report = simulate(LeastLoaded(), workloads.batch(requests=20))
    >>> document = benchmark_report(report)
    >>> document["results"]["request_performance"]["aggregate"]["requests"]["total"]
    20
    """
    document = {
        "version": VERSION,
        "run": {
            "uid": "",
            "description": f"{report.policy} on {report.workload}",
            "keywords": ["overload"] if report.overloaded else [],
            "time": {"duration": f"PT{report.span_s:.6f}S"},
        },
        "scenario": {"load": _load(report, tool), "stack": [_router(report)]},
        "results": {
            "request_performance": {"aggregate": _aggregate(report)},
            "observability": {"components": _workers(report)},
        },
    }
    text = json.dumps(document, sort_keys=True)
    # The same run has the same name wherever and whenever it is written.
    document["run"]["uid"] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()  # type: ignore[index]
    return document


def _version() -> str:
    from .. import __version__

    return __version__


def _load(report: Report, tool: str) -> dict[str, Any]:
    heads = report.arrived[~np.isnan(report.arrived)]
    span = float(heads.max() - heads.min()) if len(heads) else 0.0
    standardized: dict[str, Any] = {
        "tool": tool,
        "tool_version": _version(),
        "source": "unknown",
        "input_seq_len": _length(report.prompt_tokens.astype(np.float64)),
    }
    if span:
        standardized["rate_qps"] = len(heads) / span
    return {
        "metadata": {"description": report.workload},
        "standardized": standardized,
        "native": {"config": report.workload},
    }


def _length(tokens: Floats) -> dict[str, Any]:
    return {
        "distribution": "other",
        "value": float(tokens.mean()) if len(tokens) else 0.0,
        "min": int(tokens.min()) if len(tokens) else 0,
        "max": int(tokens.max()) if len(tokens) else 1,
    }


def _router(report: Report) -> dict[str, Any]:
    digest = hashlib.blake2b(report.policy.encode(), digest_size=8).hexdigest()
    return {
        "metadata": {"label": "router", "cfg_id": digest},
        "standardized": {
            "kind": "generic",
            "tool": "llmd",
            "tool_version": _version(),
            "policy": report.policy,
        },
        "native": {"config": report.policy},
    }


def _aggregate(report: Report) -> dict[str, Any]:
    done = report.done
    unfinished = int(np.isnan(report.ended).sum())
    rates = {
        "input_token_rate": report.prompt_tokens[done].sum(),
        "output_token_rate": report.output_tokens.sum(),
        "total_token_rate": report.prompt_tokens[done].sum()
        + report.output_tokens.sum(),
    }
    span = report.span_s or 1.0
    return {
        "requests": {
            "total": len(report.ids),
            "failures": len(report.ids) - report.completed - unfinished,
            "incomplete": unfinished,
            "input_length": _statistics(report.prompt_tokens, "count"),
            "output_length": _statistics(report.output_tokens[done], "count"),
        },
        "latency": {
            "time_to_first_token": _statistics(report.ttfts, "s"),
            "time_per_output_token": _statistics(report.tpots, "s/token"),
            "request_latency": _statistics(report.e2es, "s"),
        },
        "throughput": {
            name: {"units": "tokens/s", "mean": float(total) / span}
            for name, total in rates.items()
        }
        | {"request_rate": {"units": "queries/s", "mean": report.completed / span}},
    }


def _workers(report: Report) -> list[dict[str, Any]]:
    workers = []
    for worker in report.workers:
        if not worker.modelled:  # what a real engine did is for it to say
            continue
        there = worker.left_at - worker.joined_at
        runs = worker.runs
        aggregate: dict[str, Any] = {
            "preemptions": {"units": "count", "mean": worker.preemptions},
            "gpu_utilization": {
                "units": "fraction",
                "mean": worker.busy_s / there if there else 0.0,
            },
        }
        if len(runs) and worker.busy_s:
            # Weighed by how long each state lasted.
            weights = runs[:, 1] - runs[:, 0]
            used = float(np.average(runs[:, 5], weights=weights)) / worker.kv_blocks
            aggregate["kv_cache_usage"] = {"units": "fraction", "mean": used}
            for name, column in (("running_requests", 3), ("waiting_requests", 6)):
                mean = float(np.average(runs[:, column], weights=weights))
                aggregate[name] = {"units": "count", "mean": mean}
        # Of one stack component, the router's fleet: a replica each.
        entry = {"component_label": "router", "replica_id": worker.id}
        workers.append(entry | {"aggregate": aggregate})
    return workers


def _statistics(values: Any, units: str) -> dict[str, Any] | None:
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return None
    figures = {
        name: float(np.percentile(known, percentile))
        for name, percentile in _PERCENTILES.items()
    }
    return {
        "units": units,
        "mean": float(known.mean()),
        "stddev": float(known.std()),
        "min": float(known.min()),
        "max": float(known.max()),
        **figures,
    }
