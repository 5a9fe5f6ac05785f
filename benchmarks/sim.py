"""Measure the simulator's speed, Dynamo's replay beside it, and the routers.

python benchmarks/sim.py [--routing [--traces jittered verbatim azure]] [--ladder]

`LLMD_TRACES` names the folder of public traces; without it the sample of the
conversation trace that the tests use stands in, and says so in the keys.
`--routing` prints what docs/explanation/simulator-checked.md shows, `--ladder` the
comparison with llm-d's published 73-capacity benchmark: minutes each.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np
from numpy.typing import NDArray

import llmd
from llmd.machines import H100, H200, Machine
from llmd.machines.shape import LLAMA31_8B, Shape
from llmd.router import rivals
from llmd.router.interface import Floats
from llmd.sim import (
    EngineSettings,
    Job,
    Report,
    Slo,
    Workload,
    capacities,
    compare,
    fleet,
    simulate,
    traces,
    workloads,
)

SAMPLE = Path(__file__).parents[1] / "tests/data/mooncake_conversation_300.jsonl"
SLO = Slo(ttft_s=2.0, tpot_s=0.05)
ROUNDS = 3
ROUTERS: dict[str, llmd.Router] = {
    "least requests": llmd.LeastLoaded(),
    "round robin": llmd.RoundRobin(),
    "least work": llmd.LeastWork(),
    "llm-d 3/2/2": rivals.llm_d(),
    "llm-d affinity": rivals.LlmdAffinity(),
    "Dynamo": rivals.DynamoBlocks(),
    "SGLang": rivals.SglangCacheAware(),
    "vLLM Router": rivals.VllmKVAware(),
    "EarliestFirstToken": llmd.EarliestFirstToken(),
    "LeastDelay": llmd.LeastDelay(),
}


def folder() -> Path | None:
    """Return where the public traces are, if they are anywhere."""
    named = os.environ.get("LLMD_TRACES")
    return Path(named) if named else None


def conversation() -> tuple[str, Workload]:
    """Return the conversation trace, or its beginning, and what to call it."""
    if (traces_at := folder()) is not None:
        path = traces_at / "mooncake_conversation.jsonl.zst"
        return "conversation", traces.mooncake(path)
    return "conversation_first300", traces.mooncake(SAMPLE)


def measure() -> dict[str, float]:
    """Return requests simulated a second, and Dynamo's seconds over ours."""
    name, workload = conversation()
    calls: list[Callable[[], object]] = [
        functools.partial(simulate, llmd.LeastDelay(), workload)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        theirs = dynamo(workload, Path(scratch))
        if theirs is not None:
            calls.append(theirs)
        taken = in_turns(calls)
    figures = {f"sim.{name}.requests_per_s": len(workload) / taken[0]}
    if theirs is not None:
        figures["sim.replay.ratio"] = taken[1] / taken[0]
    return figures


def in_turns(calls: list[Callable[[], object]]) -> list[float]:
    """Return the median CPU seconds of each call, taking turns.

    Both run on one core; CPU time does not count what others do on it.
    """
    rounds: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, seconds in zip(calls, rounds, strict=True):
            start = time.process_time()
            call()
            seconds.append(time.process_time() - start)
    return [statistics.median(seconds) for seconds in rounds]


def dynamo(workload: Workload, scratch: Path) -> Callable[[], object] | None:
    """Return Dynamo's offline replay of the same, if it is installed."""
    os.environ.setdefault("DYN_LOG", "error")  # a line a request else
    try:
        from dynamo._core import run_mocker_trace_replay
    except ImportError:
        return None
    path = scratch / "trace.jsonl"
    traces.write_mooncake(workload, path)
    engine = {
        "block_size": 512,
        "num_gpu_blocks": fleet(1, block_tokens=512)[0].kv_blocks,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 256,
        "enable_prefix_caching": True,
    }
    return lambda: run_mocker_trace_replay(
        [str(path)],
        extra_engine_args={"engine": engine},
        num_workers=8,
        router_mode="kv_router",
        trace_block_size=512,
    )


def traced() -> dict[str, Workload]:
    """Return the traces to route, by name; the public ones if they are there."""
    _, verbatim = conversation()
    found = {"jittered": verbatim.jittered(3.0), "verbatim": verbatim}
    if (traces_at := folder()) is not None:
        # No two of its requests have anything in common.
        found["azure"] = traces.azure(traces_at / "azure_llm_2023_conv.csv.gz")
    return found


def set_for(router: llmd.Router, machine: Machine, step_tokens: int) -> llmd.Router:
    """Return *router* told of the engines it is for, if it asks for that."""
    if isinstance(router, llmd.LeastDelay):
        return attrs.evolve(router, machine=machine, step_tokens=step_tokens)
    if isinstance(router, llmd.EarliestFirstToken):
        return attrs.evolve(router, machine=machine)
    return router


def routing(
    jobs: int, names: list[str], asked: list[str], highest: float, step_tokens: int
) -> None:
    """Print capacities and half-load figures of routers on traces."""
    eight_b = Machine.of(H200, LLAMA31_8B)
    settings = EngineSettings(step_tokens=step_tokens)
    routers = {
        name: set_for(router, eight_b, step_tokens)
        for name, router in ROUTERS.items()
        if not asked or name in asked
    }
    for title, workload in traced().items():
        if names and title not in names:
            continue
        print(f"\n# {title}: 8 H200, Llama 3.1 8B")
        between = (3.0, highest)
        found = capacities(
            routers,
            workload,
            SLO,
            machine=eight_b,
            settings=settings,
            between=between,
            jobs=jobs,
        )
        for capacity in found.values():
            print(f"{capacity!r}", flush=True)
        half = next(iter(found.values())).rate / 2
        study = compare(
            routers,
            workload.at_rate(half),
            slo=SLO,
            machine=eight_b,
            settings=settings,
            jobs=jobs,
        )
        print(f"\nat {half:.3g} requests/s, half the capacity of {next(iter(found))}")
        print(study, flush=True)


QWEN3_32B = Shape(
    name="qwen3-32b",
    layers=64,
    hidden=5120,
    heads=64,
    kv_heads=8,
    head_dim=128,
    intermediate=25600,
    vocabulary=151936,
)
# rate: seconds, as the benchmark's report has them, one after the other, behind a
# warm-up of 50 s at 15 requests a second, one round of all users.
STAGES = {3: 20, 10: 20, 15: 20, 20: 38, 22: 34, 25: 30, 30: 25, 35: 21}
STAGES |= {40: 38, 43: 36, 46: 33, 49: 30, 52: 29, 55: 27, 57: 26, 60: 25}
DRAINED_S = 300.0
"""Between two stages; each was let run out."""
SCRAPED_S = 0.7
"""Between two looks at the engines' gauges, in which the scorers believe: with it
load scheduling has the published times to first token below its knee, as whoever
looks emptiest gets all that comes until the next look."""
OPEN = 1024
"""Requests that are open at most, Envoy's default; others are refused at once.  From
40 a second on 1,500 are sent within the time of an answer, and no more than that is
answered: the report's charts have some 85 waiting and 40 running in each pod when all
are sent, nothing is sent after that, and stages begin 200 s apart, which is 1,000
answers at the published tokens a second."""
PREFILL_PACE = 1.2
"""Of published peaks: with it random scheduling has the published times to first
token below its knee, and the 0.23 s that are not modelled."""


class ScrapedQueue(llmd.QueueDepth):
    """llm-d's queue-scorer: of the engine's gauge, however old."""

    def signal(self, request: llmd.Request, view: llmd.View) -> Floats:
        return np.nan_to_num(view.workers.reported_waiting)


class ScrapedUsage(llmd.KVHeadroom):
    """llm-d's kv-cache-scorer, likewise."""

    def signal(self, request: llmd.Request, view: llmd.View) -> Floats:
        return np.nan_to_num(view.workers.reported_kv_usage)


class Head(llmd.PrefixOverlap):
    """llm-d's approximate prefix-cache-scorer: of the first 256 blocks.

    They have 64 characters, some 16 tokens: less than the groups' prefix.
    """

    tokens = 256 * 16

    def signal(self, request: llmd.Request, view: llmd.View) -> Floats:
        held = view.cached_tokens(request)[:, llmd.Tier.GPU]
        most = min(request.prompt_tokens, self.tokens)
        return np.minimum(held, most) / most


class Heard(llmd.ExactIndex):
    """llm-d's index: of what engines have told, and not of what is on its way."""

    def expect(self, worker: llmd.WorkerId, request: llmd.Request, at: float) -> None:
        pass


class Remembered(llmd.GuessedIndex):
    """Its memory: 31,250 such blocks of each server, whatever that holds."""

    def join(self, worker: llmd.Worker, at: float) -> None:
        blocks = 31_250 * 16 // worker.block_tokens
        super().join(attrs.evolve(worker, kv_blocks=blocks), at)

    def sent(self, worker: llmd.WorkerId, names: list[int], at: float) -> None:
        super().sent(worker, names[: Head.tokens // BLOCK_TOKENS], at)


LOAD = ScrapedUsage() + ScrapedQueue()
SCORERS = {
    "precise-scheduling": (
        3 * llmd.PrefixOverlap() + 2 * ScrapedUsage() + 2 * ScrapedQueue(),
        Heard,
    ),
    "estimated-scheduling": (Head() + LOAD, lambda: Remembered(ttl=math.inf)),
    "load-scheduling": (LOAD, llmd.ExactIndex),
    "random-scheduling": (llmd.Random(), llmd.ExactIndex),
}
KV_TOKENS, BLOCK_TOKENS = 307_328, 64


def tensor_parallel() -> Machine:
    """Return Qwen3 32B on two H100: published peaks, and two gaps between tokens.

    At 3 requests a second the published mean gap between chunks is 11 ms, with
    two chunks a token (their median gap is 0): 22 ms a token for 8 requests.  With
    caches full of running requests, as under random scheduling above its knee, nine
    in ten are within 36 ms.  A floor and the pace of attention follow.  Prompts take
    `PREFILL_PACE` times as long as by peaks.
    """
    pair = attrs.evolve(
        H100,
        name="h100-x2",
        memory_bytes_per_s=2 * H100.memory_bytes_per_s,
        bf16_flops_per_s=2 * H100.bf16_flops_per_s,
    )
    machine = Machine.of(pair, QWEN3_32B)
    few, full = 8 * 7700, KV_TOKENS
    requests_s = machine.decode_s_per_request
    token_s = (36e-3 - 22e-3 - (full / 7700 - 8) * requests_s) / (full - few)
    floor = 22e-3 - few * token_s - 8 * requests_s
    return attrs.evolve(
        machine,
        decode_s_per_context_token=token_s,
        decode_floor_s=floor,
        prefill_floor_s=floor,
        prefill_s_per_token=machine.prefill_s_per_token * PREFILL_PACE,
        attention_s_per_token2=machine.attention_s_per_token2 * PREFILL_PACE,
    )


def whole_ladder(seed: int) -> Workload:
    """Return the warm-up and all stages, each behind the last, which has drained.

    Answers take longer than a stage is sent, so who is refused is who comes last.
    """
    jobs: list[Job] = []
    at = 0.0
    for number, (rate, seconds) in enumerate([(15, 50), *STAGES.items()]):
        load = workloads.shared_prefix(
            rate=rate, requests=rate * seconds, in_rounds=True, seed=seed
        )
        for job in load.jobs[:OPEN]:
            request = attrs.evolve(job.request, id=f"{number}/{job.id}")
            jobs.append(attrs.evolve(job, at=at + job.at, request=request))
        at += seconds + DRAINED_S
    return Workload(name="73-capacity", jobs=jobs)


def ladder(rates: list[int], gauges_s: float, seeds: int) -> None:
    """Print llm-d's 73-capacity benchmark, measured and simulated.

    It was measured once; simulated are the medians of *seeds* ladders.
    """
    traces_at = folder()
    if traces_at is None:
        raise SystemExit("set LLMD_TRACES")
    with (traces_at / "llmd_kvcache_measured_73.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["qps_offered"] != "all"]
    measured = {(int(float(r["qps_offered"])), r["policy"]): r for r in rows}
    loads = [whole_ladder(seed) for seed in range(1, seeds + 1)]
    pairs = ("output tokens/s", "TTFT mean, s", "TTFT p90, s", "ms a token")
    heads = ("policy", "offered/s", *(f"{pair} | simulated" for pair in pairs))
    print(f"| {' | '.join(heads)} |\n|{'---|' * 10}")
    speeds = {}
    for policy in SCORERS:
        climbs = np.array([climbed(policy, load, gauges_s) for load in loads])
        plateau, there = [], []
        for stage, rate in enumerate(STAGES):
            row, figures = measured[rate, policy], np.median(climbs[:, stage], axis=0)
            wanted = float(row["output_tok_s"])
            if rate >= SATURATED:
                plateau.append((figures[0], wanted))
                there.append([wanted, *climbs[:, stage, 0]])
            if rate in rates:
                print(
                    f"| {policy} | {rate} | {compared(figures[0], wanted)}"
                    f" | {latencies(figures[1:], row)} |",
                    flush=True,
                )
        mean = compared(*np.mean(plateau, axis=0))
        print(f"| {policy} | {SATURATED} to 60, mean | {mean} |", flush=True)
        speeds[policy] = np.array(there)
    for one, other in itertools.combinations(SCORERS, 2):
        print(f"{one}, {other}: {order(speeds[one], speeds[other])}")


def order(one: Floats, other: Floats) -> str:
    """Say how far policies were measured apart, and where ladders order them alike.

    Args:
        one: Output tokens a second, shape (rates, ladders); the first was measured.
        other: The same of another policy.
    """
    ahead, rates = one > other, len(one)
    apart = np.log(one[:, 0] / other[:, 0])
    error = apart.std(ddof=1) / math.sqrt(rates)
    alike = (ahead[:, :, None] == ahead[:, None, :]).sum(axis=0)
    others = alike[1:, 1:][np.triu_indices(len(alike) - 1, 1)]
    between = f", simulated ones alike at {others.tolist()}" if len(others) else ""
    measured = f"{100 * apart.mean():+.1f} +- {100 * error:.1f} % apart"
    return (
        f"{measured}; as measured at {alike[0, 1:].tolist()} of {rates} rates{between}"
    )


def compared(speed: float, wanted: float) -> str:
    return f"{wanted:.0f} | {speed:.0f} ({speed / wanted - 1:+.0%})"


def climbed(policy: str, load: Workload, gauges_s: float) -> list[tuple[float, ...]]:
    """Return for each stage: output tokens a second, and latencies in seconds."""
    router, index = SCORERS[policy]
    report = simulate(
        llmd.Cluster(router=router, index=index()),
        load,
        workers=fleet(
            8, block_tokens=BLOCK_TOKENS, kv_tokens=KV_TOKENS, max_running=1024
        ),
        machine=tensor_parallel(),
        settings=EngineSettings(step_tokens=8192),
        signals_s=gauges_s,
    )
    stages = np.array([int(id.split("/")[0]) for id in report.ids])
    found = []
    for number in range(1, len(STAGES) + 1):
        mine = stages == number
        first, tokens = report.ttfts[mine], (report.output_tokens[mine] - 1).sum()
        found.append(
            (
                stage_speed(report, mine),
                float(np.nanmean(first)),
                float(np.nanpercentile(first, 90)),
                float(np.nansum((report.ended - report.first)[mine]) / tokens),
            )
        )
    return found


SATURATED = 20
"""Requests a second from which random and load scheduling keep up no more."""


def stage_speed(report: Report, mine: NDArray[np.bool_]) -> float:
    """Return output tokens a second of a stage, from its first to its last."""
    seconds = np.nanmax(report.ended[mine]) - report.arrived[mine].min()
    return float(report.output_tokens[mine].sum() / seconds)


def latencies(simulated: NDArray[np.float64], row: dict[str, str]) -> str:
    """Return measured and simulated latencies of a stage, as cells of a table."""
    mean, tail, answering = simulated
    cells = (
        (row["ttft_mean_s"], f"{mean:.3g}"),
        (row["ttft_p90_s"], f"{tail:.3g}"),
        # It counts two chunks a token.
        (f"{2e3 * float(row['itl_mean_s']):.0f}", f"{1e3 * answering:.0f}"),
    )
    return " | ".join(cell for pair in cells for cell in pair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--routing", action="store_true")
    parser.add_argument("--traces", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--routers", nargs="*", default=[], choices=[[], *ROUTERS])
    parser.add_argument("--highest", type=float, default=24.0, help="requests/s tried")
    parser.add_argument(
        "--step-tokens",
        type=int,
        default=1024,
        help="of the engines: a step of 2048 takes longer than the TPOT asked for",
    )
    parser.add_argument("--ladder", action="store_true")
    parser.add_argument("--rates", type=int, nargs="+", default=[*STAGES])
    parser.add_argument("--gauges-s", type=float, default=SCRAPED_S)
    parser.add_argument("--seeds", type=int, default=1, help="of the ladder")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.routing:
        routing(
            options.jobs,
            options.traces,
            options.routers,
            options.highest,
            options.step_tokens,
        )
    elif options.ladder:
        ladder(options.rates, options.gauges_s, options.seeds)
    else:
        for name, figure in measure().items():
            print(f"{name:44} {figure:14.4g}")


if __name__ == "__main__":
    main()
