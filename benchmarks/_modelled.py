"""A fleet as its probe says it is: the side of `fidelity.py` that needs no engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from _sites import Site

import llmd
from llmd.sim import Calibration, Report, Workload, simulate

WITHIN = {"tpot": 0.10, "e2e": 0.10, "ttft_p50": 0.15, "ttft_p99": 0.30}


def figures(report: Report) -> dict[str, float]:
    """Return what is compared."""
    return {
        "tpot": float(np.nanmean(report.tpots)),
        "e2e": float(np.nanmean(report.e2es)),
        "ttft_p50": report.ttft(50),
        "ttft_p99": report.ttft(99),
        "hit_rate": report.hit_rate,
        "completed": float(report.completed),
    }


def router(fleet: Calibration) -> llmd.Router:
    """Return what chooses, on the engines and in the simulator."""
    return llmd.LeastDelay(machines=fleet.machines)


def simulated(fleet: Calibration, workload: Workload) -> Report:
    """Simulate *workload*."""
    return simulate(
        router(fleet),
        workload,
        workers=fleet.workers,
        machines=fleet.machines,
        settings=fleet.settings,
    )


def saturation(fleet: Calibration, site: Site, name: str) -> float:
    """Return the requests a second that a fleet answers at most.

    What it answers of a crowd is a first guess.  Caches fill and are fought for
    only as time goes on: then it is sent twice as much for a while.
    """
    rate = math.inf
    for requests in (60 * len(fleet.workers), 300):
        load = site.workload(name, 1.0, requests)
        # Followers wait for their turn and think: take their place in the flood.
        alone = [
            attrs.evolve(job, follows="", think_s=0.0, at=number / (2 * rate))
            for number, job in enumerate(load.jobs)
        ]
        report = simulated(fleet, attrs.evolve(load, jobs=alone))
        rate = requests / report.span_s
    return rate


def again(
    site: Site,
    measured: Sequence[Mapping[str, Any]],
    probes: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Return the rows of *measured* with what is simulated for them now.

    Args:
        site: Where they are from.
        measured: As `fidelity.py --json` keeps it.
        probes: Likewise; each workload has the one that was made before it there,
            or the first.
    """
    before = {row["workload"]: found for found in probes for row in found["rows"]}
    rows = []
    for found in measured:
        name = found["rows"][0]["workload"]
        fleet = Calibration.of(before.get(name, probes[0]))
        for row in found["rows"]:
            if "live" in row:
                load = site.workload(name, row["rate"], row["requests"])
                rows.append({**row, "sim": figures(simulated(fleet, load))})
    return rows


def told(row: Mapping[str, Any]) -> str:
    """Return a line: measured and simulated, and by how much that is off."""
    live, sim = row["live"], row["sim"]
    parts = [f"{row['workload']:14} {row['load']:.0%}"]
    parts += [
        f"{name} {live[name] * 1e3:.1f}/{sim[name] * 1e3:.1f} ms"
        f" ({sim[name] / live[name] - 1:+.0%})"
        for name in WITHIN
    ]
    parts.append(f"hits {live['hit_rate']:.3f}/{sim['hit_rate']:.3f}")
    return "  ".join(parts)


def summed(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return medians of errors, and how many figures are within the bounds."""
    off = {
        name: [abs(row["sim"][name] / row["live"][name] - 1) for row in rows]
        for name in WITHIN
    }
    inside = sum(error <= WITHIN[name] for name in off for error in off[name])
    medians = ", ".join(f"{name} {np.median(off[name]):.1%}" for name in off)
    return (
        f"{inside} of {4 * len(rows)} figures within bounds; median errors: {medians}"
    )
