"""Measure the simulator's speed, Dynamo's replay beside it, and the routers.

python benchmarks/sim.py [--study | --routing [--traces jittered verbatim tools azure]]

`LLMD_TRACES` names the folder of public traces; without it the sample of the
conversation trace that the tests use stands in, and says so in the keys.
`--study` times a comparison of twenty policies.  `--routing` prints what
docs/explanation/simulator-checked.md shows, in minutes.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import attrs

import llmd
from llmd.machines import H200, Machine
from llmd.machines.shape import LLAMA31_8B
from llmd.router import rivals
from llmd.sim import (
    EngineSettings,
    Slo,
    Workload,
    capacities,
    compare,
    fleet,
    simulate,
    traces,
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
        # Tools and agents: 1,000 requests of the trace, in 177 s.
        found["tools"] = traces.mooncake(
            traces_at / "mooncake_arxiv_first1000.jsonl.zst"
        )
        found["tools jittered"] = found["tools"].jittered(3.0)
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


def studied(jobs: int) -> float:
    """Return the seconds that twenty policies take, three seeds, 2,000 requests."""
    name, workload = conversation()
    load = workload.jittered(3.0).first(2000)
    blends = {
        f"prefix {weight}": weight * llmd.PrefixOverlap()
        + llmd.KVHeadroom()
        + llmd.QueueDepth()
        for weight in range(1, 11)
    }
    begun = time.perf_counter()
    study = compare(ROUTERS | blends, load, seeds=3, slo=SLO, jobs=jobs)
    seconds = time.perf_counter() - begun
    print(study)
    print(f"{len(study.policies)} policies, 3 seeds, {len(load)} requests of {name}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", action="store_true")
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
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.study:
        print(f"{studied(options.jobs):.1f} s with {options.jobs} processes")
    elif options.routing:
        routing(
            options.jobs,
            options.traces,
            options.routers,
            options.highest,
            options.step_tokens,
        )
    else:
        for name, figure in measure().items():
            print(f"{name:44} {figure:14.4g}")


if __name__ == "__main__":
    main()
