"""The simulator beside real vLLM engines, on the same requests.

    python benchmarks/fidelity.py [--engines 2] [--seconds 20] [--json PATH]
    python benchmarks/fidelity.py --gpu [--json PATH]

Engines with random weights are started and probed for some 30 s: prompts, cached
prompts and batches of all sizes, each timed by who asked.  `fit_from_probe` makes
step times of that.  Four workloads at 30, 60 and 85 % of the load that saturates
the modelled fleet are then sent to the engines by `LoadGenerator`, and simulated
with the same router on the same requests.  Nothing is fitted to these.

On CPUs a model of four layers, one core an engine; with `--gpu` one engine of the
shape of Qwen2.5-7B.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

import llmd
from llmd.adapters.vllm.engine import VllmEngine
from llmd.live import Call, Server
from llmd.loadgen import LoadGenerator, ScheduleLag
from llmd.machines import Machine
from llmd.machines.fit import Step, errors, fit_from_probe
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
    shape=_shape(256, 4, 4, 2, intermediate_size=704, vocab_size=2048),
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


# Probing ---------------------------------------------------------------------


@attrs.define
class Prober:
    """Times steps of one engine, as its client sees them."""

    engine: VllmEngine
    site: Site
    steps: list[Step] = attrs.field(factory=list)
    waits: list[tuple[float, float]] = attrs.field(factory=list)
    _count: Any = attrs.field(factory=itertools.count, init=False)
    _rng: Any = attrs.field(factory=lambda: np.random.default_rng(5), init=False)

    async def run(self) -> None:
        await self._prefill(max(self.site.prompts), 0)
        await self._decode(max(self.site.batches), 32)
        self.steps.clear()  # that was to warm up
        for context in self.site.contexts:
            for tokens in self.site.prompts:
                await self._prefill(tokens, context)
        for context in self.site.contexts:
            for requests in self.site.batches:
                await self._decode(requests, max(context, 32))
        for tokens, requests in itertools.product(
            self.site.prompts[::2], self.site.batches[2::2]
        ):
            for _ in range(3):
                await self._mixed(tokens, requests, max(self.site.contexts[1], 32))

    async def _prefill(self, tokens: int, context: int) -> None:
        head = self._tokens(context)
        if context:
            await self._first([*head, 7])
        times = [await self._first([*head, *self._tokens(tokens)]) for _ in range(3)]
        self.steps.append(Step(tokens, context, 0, 0, statistics.median(times)))

    async def _decode(self, requests: int, context: int) -> None:
        """Let *requests* generate together and take the gaps while all do."""
        new, head = 40, self._tokens(context)
        await self._first(head)
        arrivals: list[list[float]] = [[] for _ in range(requests)]

        async def one(times: list[float]) -> None:
            stream = self._ask([*head, *self._tokens(1)], new)
            times += [time.perf_counter() async for piece in stream if piece.token_ids]

        await asyncio.gather(*(one(times) for times in arrivals))
        begun = max(times[0] for times in arrivals)
        over = min(times[-1] for times in arrivals)
        inside = [t for t in arrivals[0] if begun < t < over]
        if len(inside) < 8:
            return
        # The mean, as one slow step in a few is a step that users wait for.
        gap = (inside[-1] - inside[0]) / (len(inside) - 1)
        middle = requests * (context + new / 2)
        self.steps.append(Step(0, 0, requests, middle, gap))

    async def _mixed(self, tokens: int, requests: int, context: int) -> None:
        """Let a prompt join *requests* that generate, and time the step of both."""
        new, head = 60, self._tokens(context)
        await self._first(head)
        running: list[list[float]] = [[] for _ in range(requests)]

        async def one(times: list[float]) -> None:
            async for piece in self._ask([*head, *self._tokens(1)], new):
                times.extend([time.perf_counter()] * bool(piece.token_ids))

        async def joins() -> float:
            while min(map(len, running)) < 15:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            return await self._first(self._tokens(tokens))

        *_, waited = await asyncio.gather(*map(one, running), joins())
        # All of them sat through it: its length is the longest gap of each.
        gaps = [float(np.diff(times[12:]).max()) for times in running]
        step = statistics.median(gaps)
        at = requests * (context + 20.0)
        self.steps.append(Step(tokens, 0, requests, at, step))
        self.waits.append((step, waited))

    async def _first(self, tokens: Sequence[int]) -> float:
        begun = time.perf_counter()
        async for piece in self._ask(tokens, 1):
            if piece.token_ids:
                return time.perf_counter() - begun
        raise RuntimeError("no token came")

    def _ask(self, tokens: Sequence[int], new: int) -> Any:
        request = llmd.Request(
            id=f"probe{next(self._count)}", prompt=tokens, max_new_tokens=new
        )
        sampling = {"ignore_eos": True, "temperature": 0.0}
        return self.engine.generate(Call(request=request, sampling=sampling))

    def _tokens(self, count: int) -> list[int]:
        vocabulary = self.site.shape["vocab_size"]
        return self._rng.integers(10, vocabulary - 10, count).tolist()


# Comparing -------------------------------------------------------------------


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
    """The engines' facts and the machine that was fitted to them."""

    workers: list[llmd.Worker]
    machine: Machine
    site: Site

    def router(self) -> llmd.Router:
        return llmd.LeastDelay(self.machine)

    def simulate(self, workload: Workload) -> Report:
        return simulate(
            self.router(),
            workload,
            workers=self.workers,
            machine=self.machine,
            settings=EngineSettings(step_tokens=self.site.step_tokens),
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
            # The engines take every core there is: let this thread have its turn.
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, 0, -15)
            begun = time.perf_counter()
            probers = [Prober(engine, site) for engine in made]
            for prober in probers:
                await prober.run()
            probed_s = time.perf_counter() - begun
            steps = [step for prober in probers for step in prober.steps]
            machine = fit_from_probe(steps)
            fit = errors(machine, steps)
            print(f"probed {probed_s:.0f} s; fit: {fit}", flush=True)
            facts = [*server.cluster.view.workers.facts]
            fleet = Fleet(facts, machine, site)
            found: dict[str, Any] = {
                "probe_s": probed_s,
                "fit": attrs.asdict(fit),
                "machine": {
                    name: value
                    for name, value in attrs.asdict(machine).items()
                    if isinstance(value, float)
                },
                "steps": [attrs.astuple(step) for step in steps],
                "waits": [wait for prober in probers for wait in prober.waits],
                "rows": [],
            }
            keep(found)
            async for row in _grid(server, fleet, seconds, cells):
                found["rows"].append(row)
                keep(found)


async def _grid(
    server: Server, fleet: Fleet, seconds: float, cells: Sequence[tuple[str, float]]
) -> AsyncIterator[dict[str, Any]]:
    vocabulary = fleet.site.shape["vocab_size"]
    for name, load in cells:
        rate = load * saturation(fleet.site, name, fleet)
        workload = fleet.site.workload(name, rate, max(int(rate * seconds), 40))
        await _clear(server)
        server.cluster.router = fleet.router()
        generator = LoadGenerator(server, vocabulary=vocabulary)
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
    parser.add_argument("--cells", nargs="*", metavar="WORKLOAD:LOAD")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Answers of so many requests are handled without a look at whose turn it is.
    os.environ.setdefault("VLLM_V1_OUTPUT_PROC_CHUNK_SIZE", "16")
    site, engines = (GPU, 1) if options.gpu else (CPU, 2)
    cells = [(name, load) for name in NAMES for load in LOADS]
    if options.cells:
        split = [cell.split(":") for cell in options.cells]
        cells = [(name, float(load)) for name, load in split]

    def keep(found: dict[str, Any]) -> None:
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")

    count = options.engines or engines
    asyncio.run(measure(site, count, options.seconds, cells, keep))


if __name__ == "__main__":
    main()
