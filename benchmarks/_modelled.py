"""A fleet as its probe says it is: the side of `fidelity.py` that needs no engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from _engine_probe import Prober, line
from _sites import Site

import llmd
from llmd.machines import Machine
from llmd.machines.fit import Step, errors, fit_from_probe
from llmd.sim import EngineSettings, Report, Workload, simulate

WITHIN = {"tpot": 0.10, "e2e": 0.10, "ttft_p50": 0.15, "ttft_p99": 0.30}
_FACTS = "id", "machine", "kv_blocks", "block_tokens", "max_running"


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


def kept(
    workers: Iterable[llmd.Worker],
    probers: Iterable[Prober],
    settings: EngineSettings,
    graph_tokens: float,
) -> dict[str, Any]:
    """Return what engines told and a probe saw, for JSON: a fleet is made of it."""
    engines = [
        {
            **{name: getattr(worker, name) for name in _FACTS},
            "steps": [attrs.astuple(step) for step in prober.steps],
            "rests": prober.rests,
            "launches": prober.launches,
            "late": prober.late,
        }
        for worker, prober in zip(workers, probers, strict=True)
    ]
    return {
        "engines": engines,
        "step_tokens": settings.step_tokens,
        "steps_ahead": settings.steps_ahead,
        "graph_tokens": graph_tokens,
    }


@attrs.define
class Fleet:
    """Engines' facts, and the machines and settings that were fitted to a probe.

    Engines that are alike need not be as fast: one may share its core.
    """

    workers: list[llmd.Worker]
    machines: dict[str, Machine]
    settings: EngineSettings
    fit: str

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Fleet:
        """Fit the fleet that `kept` kept."""
        workers, machines, fits = [], {}, []
        rests, late = [], []
        for engine in found["engines"]:
            workers.append(llmd.Worker(**{name: engine[name] for name in _FACTS}))
            steps = [Step(*step) for step in engine["steps"]]
            host = line(engine["launches"]) if engine["launches"] else (0.0, 0.0)
            start = Machine(
                graph_tokens=found["graph_tokens"],
                host_s=host[0],
                host_s_per_request=host[1],
            )
            machine = fit_from_probe(steps, start)
            machines[engine["machine"]] = machine
            fits.append(str(errors(machine, steps)))
            rests += engine["rests"]
            late += engine["late"]
        base, each = line(rests)
        crowd = line(late)[1] if late else 0.0
        fits.append(
            f"intake: {base * 1e3:.1f} ms, {each * 1e6:.2f} us a token"
            f" and {crowd * 1e6:.0f} us for each other request"
        )
        settings = EngineSettings(
            step_tokens=found["step_tokens"],
            steps_ahead=found["steps_ahead"],
            intake_s=base,
            intake_s_per_token=each,
            intake_s_per_request=crowd,
        )
        return cls(workers, machines, settings, "; ".join(fits))

    def router(self) -> llmd.Router:
        return llmd.LeastDelay(machines=self.machines)

    def simulate(self, workload: Workload) -> Report:
        return simulate(
            self.router(),
            workload,
            workers=self.workers,
            machines=self.machines,
            settings=self.settings,
        )

    def saturation(self, site: Site, name: str) -> float:
        """Return the requests a second that it answers at most.

        What it answers of a crowd is a first guess.  Caches fill and are fought for
        only as time goes on: then it is sent twice as much for a while.
        """
        rate = math.inf
        for requests in (60 * len(self.workers), 300):
            load = site.workload(name, 1.0, requests)
            # Followers wait for their turn and think: take their place in the flood.
            alone = [
                attrs.evolve(job, follows="", think_s=0.0, at=number / (2 * rate))
                for number, job in enumerate(load.jobs)
            ]
            report = self.simulate(attrs.evolve(load, jobs=alone))
            rate = requests / report.span_s
        return rate


def again(
    site: Site,
    measured: Sequence[Mapping[str, Any]],
    probes: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Return the rows of *measured* with what is simulated for them now.

    Args:
        site: Where they are from.
        measured: As `fidelity.py --json` keeps it.
        probes: The fleet is fitted to these, of another run, one after the other.
    """
    rows = []
    for number, found in enumerate(measured):
        fleet = Fleet.of(probes[number % len(probes)] if probes else found)
        for row in found["rows"]:
            if "live" in row:
                load = site.workload(row["workload"], row["rate"], row["requests"])
                rows.append({**row, "sim": figures(fleet.simulate(load))})
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
