"""Measure the simulator's speed, Dynamo's replay beside it, and the routers.

python benchmarks/sim.py [--routing] [--ladder]

`LLMD_TRACES` names the folder of public traces; without it the sample of the
conversation trace that the tests use stands in, and says so in the keys.
`--routing` prints what docs/explanation/routing.md shows, `--ladder` the
comparison with llm-d's published 73-capacity benchmark: minutes each.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import attrs

import llmd
from llmd.machines import H100, H200, Machine
from llmd.machines.shape import LLAMA31_8B, Shape
from llmd.router import rivals
from llmd.sim import (
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
    "round robin": llmd.RoundRobin(),
    "least requests": llmd.LeastLoaded(),
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


def routing(jobs: int) -> None:
    """Print capacities and half-load figures on the conversation trace."""
    _, verbatim = conversation()
    eight_b = Machine.of(H200, LLAMA31_8B)
    routers = {
        name: attrs.evolve(router, machine=eight_b)
        if isinstance(router, llmd.EarliestFirstToken | llmd.LeastDelay)
        else router
        for name, router in ROUTERS.items()
    }
    for title, workload in (
        ("jittered inside 3 s", verbatim.jittered(3.0)),
        ("verbatim", verbatim),
    ):
        print(f"\n# Conversation trace, {title}: 8 H200, Llama 3.1 8B")
        found = capacities(
            routers, workload, SLO, machine=eight_b, between=(3.0, 24.0), jobs=jobs
        )
        for capacity in found.values():
            print(f"{capacity!r}", flush=True)
        half = found["least requests"].rate / 2
        study = compare(
            routers, workload.at_rate(half), slo=SLO, machine=eight_b, jobs=jobs
        )
        print(f"\nat {half:.3g} requests/s, half the capacity of least requests")
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


def ladder(jobs: int) -> None:
    """Print llm-d's 73-capacity benchmark, measured and simulated."""
    traces_at = folder()
    if traces_at is None:
        raise SystemExit("set LLMD_TRACES")
    with (traces_at / "llmd_kvcache_measured_73.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["qps_offered"] != "all"]
    measured = {(float(r["qps_offered"]), r["policy"]): r for r in rows}
    # Two H100 as one machine of twice the rates, 80 % of their memory used.
    pair = attrs.evolve(
        H100,
        name="h100-x2",
        memory_bytes=2 * H100.memory_bytes,
        memory_bytes_per_s=2 * H100.memory_bytes_per_s,
        bf16_flops_per_s=2 * H100.bf16_flops_per_s,
    )
    machine = Machine.of(pair, QWEN3_32B)
    kv_tokens = int(
        (0.9 * pair.memory_bytes - machine.weights_bytes) / machine.kv_bytes_per_token
    )
    workers = fleet(8, block_tokens=64, kv_tokens=kv_tokens)
    policies: dict[str, Callable[[], llmd.Cluster]] = {
        "precise-scheduling": lambda: llmd.Cluster(router=rivals.llm_d()),
        "estimated-scheduling": lambda: llmd.Cluster(
            router=rivals.llm_d(), index=llmd.GuessedIndex()
        ),
        "load-scheduling": lambda: llmd.Cluster(
            router=llmd.KVHeadroom() + llmd.QueueDepth()
        ),
        "random-scheduling": lambda: llmd.Cluster(router=llmd.Random()),
    }
    print("| offered/s | policy | output tokens/s | simulated | TTFT p90 | simulated |")
    print("|---|---|---|---|---|---|")
    for rate in sorted({qps for qps, _ in measured}):
        load = workloads.shared_prefix(rate=rate, requests=int(rate * 60), burstiness=1)
        study = compare(policies, load, workers=workers, machine=machine, jobs=jobs)
        for policy in policies:
            row, [report] = measured[rate, policy], study.reports[policy]
            print(
                f"| {rate:g} | {policy} | {row['output_tok_s']}"
                f" | {report.throughput:.0f} | {row['ttft_p90_s']}"
                f" | {report.ttft(90):.3g} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--routing", action="store_true")
    parser.add_argument("--ladder", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.routing:
        routing(options.jobs)
    elif options.ladder:
        ladder(options.jobs)
    else:
        for name, figure in measure().items():
            print(f"{name:44} {figure:14.4g}")


if __name__ == "__main__":
    main()
