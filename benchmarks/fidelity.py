"""The simulator beside real vLLM engines, on the same requests.

    python benchmarks/fidelity.py [--engines 2] [--seconds 20] [--json PATH]
    python benchmarks/fidelity.py --gpu [--json PATH]
    python benchmarks/fidelity.py --watch 120

Engines with random weights are started and probed for some 30 s: prompts, cached
prompts and batches of all sizes.  `fit_from_probe` makes step times of that, and
what is left of the times to first token is the settings' intake.  Four workloads
at 30, 60 and 85 % of the load that saturates the modelled fleet are then sent to
the engines by `LoadGenerator`, and simulated with the same router on the same
requests.  Nothing is fitted to these.

On CPUs a model of four layers, one core an engine; with `--gpu` one engine of the
shape of Qwen2.5-7B.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from _engine_probe import Prober, intake

import llmd
from llmd.adapters.vllm.engine import VllmEngine
from llmd.live import Server
from llmd.loadgen import LoadGenerator, ScheduleLag
from llmd.machines import Machine
from llmd.machines.fit import errors, fit_from_probe
from llmd.sim import EngineSettings, Report, Workload, simulate, workloads

NAMES = ("dialogue", "documents", "batch", "shared_prefix")
LOADS = (0.3, 0.6, 0.85)
WITHIN = {"tpot": 0.10, "e2e": 0.10, "ttft_p50": 0.15, "ttft_p99": 0.30}


@attrs.frozen(kw_only=True)
class Site:
    """What runs where.

    Attributes:
        shape: Of the model, for its config.json.
        options: Of each engine.
        step_tokens: Most tokens a step computes.
        prompts: Lengths to probe, in one step each.
        contexts: Cached tokens ahead of them.
        batches: Requests that decode together.
        scale: Of the workloads' lengths.
    """

    shape: dict[str, Any]
    options: dict[str, Any]
    step_tokens: int
    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    scale: float

    @property
    def vocabulary(self) -> int:
        """Ids of tokens are below it."""
        return int(self.shape["vocab_size"])

    def workload(self, name: str, rate: float, requests: int) -> Workload:
        """Make one of the four kinds."""
        size = self.scale
        common: dict[str, Any] = {"rate": rate, "requests": requests, "seed": 11}

        def of(tokens: float) -> int:
            return max(int(tokens * size), 8)

        if name == "dialogue":
            return workloads.dialogue(
                turns=4.0,
                system_tokens=of(400),
                question_tokens=of(60),
                answer_tokens=of(180),
                think_s=2.0,
                **common,
            )
        if name == "documents":
            return workloads.documents(
                document_tokens=of(2400),
                question_tokens=of(60),
                answer_tokens=of(100),
                **common,
            )
        if name == "batch":
            return workloads.batch(
                prompt_tokens=of(400), answer_tokens=of(240), **common
            )
        return workloads.shared_prefix(
            groups=12,
            users_per_group=4,
            system_tokens=of(1600),
            question_tokens=of(160),
            answer_tokens=of(160),
            **common,
        )


def _shape(hidden: int, layers: int, heads: int, kv_heads: int, **more: int) -> dict:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_sliding_window": False,
        "max_position_embeddings": 32_768,
        **more,
    }


CPU = Site(
    shape=_shape(512, 4, 8, 4, intermediate_size=1408, vocab_size=2048),
    options={
        "max_model_len": 4096,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 96 << 20,
    },
    step_tokens=512,
    prompts=(16, 48, 128, 256, 384, 500),
    contexts=(0, 512, 1536),
    batches=(1, 2, 4, 8, 12, 16),
    scale=0.25,
)
GPU = Site(
    shape={
        **_shape(3584, 28, 28, 4, intermediate_size=18_944, vocab_size=152_064),
        "torch_dtype": "bfloat16",
    },
    options={
        "max_model_len": 16_384,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 128,
        "kv_cache_memory_bytes": 24 << 30,
        "gpu_memory_utilization": 0.6,
    },
    step_tokens=2048,
    prompts=(64, 256, 512, 1024, 1536, 2000),
    contexts=(0, 2048, 8192),
    batches=(1, 4, 16, 32, 64, 128),
    scale=1.0,
)


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


def saturation(site: Site, name: str, fleet: Fleet) -> float:
    """Return the requests a second that the modelled fleet answers at most."""
    requests = 60 * len(fleet.workers)
    crowd = site.workload(name, 1e4, requests)
    # Followers wait for their turn and think: take their place in the crowd.
    alone = [attrs.evolve(job, follows="", think_s=0.0, at=0.0) for job in crowd.jobs]
    report = fleet.simulate(attrs.evolve(crowd, jobs=alone))
    return requests / report.span_s


@attrs.define
class Fleet:
    """The engines' facts, and the machine and settings that were fitted to them."""

    workers: list[llmd.Worker]
    machine: Machine
    settings: EngineSettings

    def router(self) -> llmd.Router:
        return llmd.LeastDelay(self.machine)

    def simulate(self, workload: Workload) -> Report:
        return simulate(
            self.router(),
            workload,
            workers=self.workers,
            machine=self.machine,
            settings=self.settings,
        )


async def measure(
    site: Site,
    engines: int,
    seconds: float,
    cells: Sequence[tuple[str, float]],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Probe, fit, and run *cells*; have *keep* keep all figures so far."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(site.shape))
        async with Server(llmd.Cluster()) as server:
            made = [_engine(site, folder) for _ in range(engines)]
            for number, engine in enumerate(made):
                await server.add(engine, f"w{number}")
            if site is CPU:
                for core, engine in enumerate(made):
                    _pin(engine, core)
            # The engines take every core there is: let this thread have its turn.
            with contextlib.suppress(OSError):
                os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
            begun = time.perf_counter()
            probers = [Prober(engine, site) for engine in made]
            # At once, as they share a host and slow each other down.
            await asyncio.gather(*(prober.run() for prober in probers))
            probed_s = time.perf_counter() - begun
            steps = [step for prober in probers for step in prober.steps]
            start = Machine(graph_tokens=_graph_tokens(made[0]))
            machine = fit_from_probe(steps, start)
            fit = errors(machine, steps)
            print(f"probed {probed_s:.0f} s; fit: {fit}", flush=True)
            facts = [*server.cluster.view.workers.facts]
            rests = [rest for prober in probers for rest in prober.rests]
            base, each = intake(rests)
            print(f"intake: {base * 1e3:.1f} ms and {each * 1e6:.2f} us a token")
            scheduling = made[0]._llm.vllm_config.scheduler_config
            settings = EngineSettings(
                step_tokens=site.step_tokens,
                steps_ahead=int(scheduling.async_scheduling),
                intake_s=base,
                intake_s_per_token=each,
            )
            fleet = Fleet(facts, machine, settings)
            found: dict[str, Any] = {
                "probe_s": probed_s,
                "fit": attrs.asdict(fit),
                "machine": {
                    name: value
                    for name, value in attrs.asdict(machine).items()
                    if isinstance(value, float)
                },
                "steps": [attrs.astuple(step) for step in steps],
                "intake": [base, each],
                "rests": rests,
                "rows": [],
            }
            keep(found)
            async for row in _grid(server, site, fleet, seconds, cells):
                found["rows"].append(row)
                keep(found)


async def watch(site: Site, seconds: float) -> None:
    """Ask one engine for the same steps again and again, alone, and print them."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(site.shape))
        async with Server(llmd.Cluster()) as server:
            engine = _engine(site, folder)
            await server.add(engine, "w0")
            prober = Prober(engine, site)
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                await prober.decode(4, 512)
    steps = [step.seconds for step in prober.steps]
    shown = [f"{1e3 * value:.2f}" for value in np.quantile(steps, (0.05, 0.5, 0.95))]
    print(f"{len(steps)} times 40 steps of 4 requests: {shown} ms (p5, p50, p95)")


async def _grid(
    server: Server,
    site: Site,
    fleet: Fleet,
    seconds: float,
    cells: Sequence[tuple[str, float]],
) -> AsyncIterator[dict[str, Any]]:
    for name, load in cells:
        rate = load * saturation(site, name, fleet)
        workload = site.workload(name, rate, max(int(rate * seconds), 40))
        await _clear(server)
        server.cluster.router = fleet.router()
        generator = LoadGenerator(server, vocabulary=site.vocabulary)
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
            row["sim"] = figures(fleet.simulate(workload))
            _print(row)
        yield row


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
    return VllmEngine(model, names=["shape"], options=options)


def _pin(engine: VllmEngine, core: int) -> None:
    """Keep an engine's threads on one core, where its caches are."""
    for process in engine._cores:
        for thread in os.listdir(f"/proc/{process.pid}/task"):
            os.sched_setaffinity(int(thread), {core % (os.cpu_count() or 1)})


def _graph_tokens(engine: VllmEngine) -> float:
    """Return the tokens of the largest step with a prompt that is a CUDA graph."""
    config = engine._llm.vllm_config.compilation_config
    graphs = config.cudagraph_mode.has_piecewise_cudagraphs()
    return float(config.max_cudagraph_capture_size) if graphs else 0.0


def _print(row: dict[str, Any]) -> None:
    live, sim = row["live"], row["sim"]
    parts = [f"{row['workload']:14} {row['load']:.0%}"]
    parts += [
        f"{name} {live[name] * 1e3:.1f}/{sim[name] * 1e3:.1f} ms"
        f" ({sim[name] / live[name] - 1:+.0%})"
        for name in WITHIN
    ]
    parts.append(f"hits {live['hit_rate']:.3f}/{sim['hit_rate']:.3f}")
    print("  ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--engines", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--watch", type=float, metavar="SECONDS")
    parser.add_argument("--cells", nargs="*", metavar="WORKLOAD:LOAD")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Answers of so many requests are handled without a look at whose turn it is.
    os.environ.setdefault("VLLM_V1_OUTPUT_PROC_CHUNK_SIZE", "4")
    site, engines = (GPU, 1) if options.gpu else (CPU, 2)
    cells = [(name, load) for name in NAMES for load in LOADS]
    if options.cells:
        split = [cell.split(":") for cell in options.cells]
        cells = [(name, float(load)) for name, load in split]

    def keep(found: dict[str, Any]) -> None:
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")

    if options.watch:
        asyncio.run(watch(site, options.watch))
        return
    count = options.engines or engines
    asyncio.run(measure(site, count, options.seconds, cells, keep))


if __name__ == "__main__":
    main()
