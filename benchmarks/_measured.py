"""Real vLLM engines, probed and sent workloads: the side of `fidelity.py` that runs."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _modelled import figures, router, saturation, simulated, told
from _sites import CPU, Site

import llmd
from llmd.adapters.vllm.engine import VllmEngine
from llmd.adapters.vllm.probe import Asked, calibrate
from llmd.adapters.vllm.prober import Prober
from llmd.live import Server
from llmd.loadgen import LoadGenerator, ScheduleLag
from llmd.machines import merged_context
from llmd.sim import Calibration

STAMPS = "LLMD_STAMPS"
"""Names the file that `_stamped.py` writes."""


@contextlib.asynccontextmanager
async def started(site: Site, engines: int) -> AsyncIterator[Server]:
    """Start engines, and give this thread the first place at the cores."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(site.shape))
        async with Server(llmd.Cluster()) as server:
            made = [_engine(site, folder) for _ in range(engines)]
            for number, engine in enumerate(made):
                name = f"w{number}"
                await server.add(engine, name, llmd.Worker(id=name, machine=name))
                if site is CPU:
                    _pin(engine, number)
            # The engines take every core there is: let this thread have its turn.
            with contextlib.suppress(OSError):
                os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
            yield server


async def measure(
    site: Site,
    engines: int,
    seconds: float,
    cells: Sequence[tuple[str, float]],
    keep: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Probe, fit and run *cells*, workload by workload; *keep* keeps all figures.

    A machine that is shared is not as fast all day: each workload has its probe.
    """
    found = []
    async with started(site, engines) as server:
        for _, same in itertools.groupby(cells, key=lambda cell: cell[0]):
            await _clear(server)
            begun = time.perf_counter()
            fleet = await calibrate(server, site.sizes)
            probed_s = time.perf_counter() - begun
            print(f"{fleet}; probed {probed_s:.0f} s", flush=True)
            found.append(probe := fleet.as_dict())
            probe |= {"probe_s": probed_s, "rows": []}
            async for row in _grid(server, site, fleet, seconds, [*same]):
                probe["rows"].append(row)
                keep(found)


async def watch(site: Site, engines: int, seconds: float) -> None:
    """Time the same steps again and again: of each engine alone, then of all."""

    async def spend(prober: Prober) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await prober.decode(4, 512)
            await prober.prefill(128, [])

    def show(name: str) -> None:
        steps = [step for prober in probers for step in prober.steps]
        for kind in (True, False):
            times = [s.seconds for s in steps if (s.prefill_tokens > 0) == kind]
            low, middle, high = 1e3 * np.quantile(times, (0.05, 0.5, 0.95))
            what = "a prompt of 100 to 128 tokens" if kind else "a token of 4 requests"
            print(f"{name}: {what} {low:.2f}, {middle:.2f}, {high:.2f} ms", flush=True)

    async with started(site, engines) as server:
        server.cluster.router = Asked()
        probers = [Prober(server, id, site.sizes, ahead=False) for id in server.engines]
        for prober in probers:
            await prober.prefill(500, [])
            prober.steps.clear()
            await spend(prober)
        show("alone (p5, p50, p95)")
        for prober in probers:
            prober.steps.clear()
        await asyncio.gather(*map(spend, probers))
        show("at once")


async def _grid(
    server: Server,
    site: Site,
    fleet: Calibration,
    seconds: float,
    cells: Sequence[tuple[str, float]],
) -> AsyncIterator[dict[str, Any]]:
    for name, load in cells:
        rate = load * saturation(fleet, site, name)
        workload = site.workload(name, rate, max(int(rate * seconds), site.requests))
        await _clear(server)
        server.cluster.router = router(fleet)
        generator, begun = (
            LoadGenerator(server, site.sizes.vocabulary),
            time.monotonic(),
        )
        row: dict[str, Any] = {
            "workload": name,
            "load": load,
            "rate": rate,
            "requests": len(workload),
        }
        try:
            row["live"] = figures(await generator.run(workload))
        except ScheduleLag as lag:
            row["lag"] = str(lag)
            print(f"{name} {load:.0%}: {lag}", flush=True)
        else:
            row["sim"] = figures(simulated(fleet, workload))
            print(told(row), flush=True)
        if STAMPS in os.environ:
            await _clear(server)  # so that they are written
            print(*_took(fleet, begun), sep="\n", flush=True)
        yield row


def _took(fleet: Calibration, since: float) -> Iterator[str]:
    """Say what stamped steps took on average, and what is fitted, by their kind."""
    at = Path(os.environ[STAMPS])
    files = sorted(
        at.parent.glob(f"{at.name}.*"), key=lambda file: int(file.suffix[1:])
    )
    for worker, file in zip(fleet.workers, files, strict=True):
        machine = fleet.machines[worker.machine]
        kinds: dict[str, list[tuple[float, float]]] = {}
        last = 0.0
        for line in file.read_text().splitlines():
            begun, _, _, seen, parts, *rest = json.loads(line)
            if begun >= since:
                tokens = sum(own for own, _ in parts)
                fitted = machine.step_s(tokens, merged_context(parts), *rest)
                kind = " beside ".join(
                    [*["prompts"] * bool(tokens), *["answers"] * bool(rest[0])]
                )
                # One that was scheduled ahead follows the outcome before it.
                took_s = seen - max(begun, last)
                kinds.setdefault(kind, []).append((took_s, fitted))
            last = seen
        for kind, pairs in kinds.items():
            took, fitted = 1e3 * np.mean(pairs, axis=0)
            yield (
                f"  {worker.id}: {len(pairs)} steps of {kind}: {took:.1f} ms,"
                f" fitted {fitted:.1f} ({fitted / took - 1:+.1%})"
            )


async def _clear(server: Server) -> None:
    """Empty the engines' caches: each run begins as its simulation does."""
    for ticket in server.engines.values():
        await ticket._llm.reset_prefix_cache()
    # What was made so far stays; to walk over it makes the generator late.
    gc.collect()
    gc.freeze()
    await asyncio.sleep(0.5)


def _engine(site: Site, model: str) -> VllmEngine:
    options = {"load_format": "dummy", "skip_tokenizer_init": True, **site.options}
    if STAMPS in os.environ:
        kind = "InTurn" if site.sizes.shared else "Ahead"
        options["scheduler_cls"] = f"_stamped.{kind}"
    return VllmEngine(model, names=["shape"], options=options)


def _pin(engine: VllmEngine, core: int) -> None:
    """Keep an engine's threads on one core, where its caches are."""
    for process in engine._cores:
        for thread in os.listdir(f"/proc/{process.pid}/task"):
            os.sched_setaffinity(int(thread), {core % (os.cpu_count() or 1)})
