"""llm-d's 73-capacity benchmark of four routing strategies, measured and simulated.

LLMD_TRACES=... python benchmarks/ladder.py [--seeds 5] [--rates 3 15 20 30 ...]

`LLMD_TRACES` names the folder of public traces, with what llm-d measured in it
(`llmd_kvcache_measured_73.csv`); prints the tables of
docs/explanation/simulator-checked.md.  A ladder takes a minute on a core.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import attrs
import numpy as np
from numpy.typing import NDArray

import llmd
from llmd.machines import H100, Machine
from llmd.machines.shape import Shape
from llmd.router.interface import Floats
from llmd.sim import (
    EngineSettings,
    Job,
    Report,
    WorkerLoad,
    Workload,
    fleet,
    simulate,
    workloads,
)

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
SCRAPED_S = 0.5
"""Between two looks at the engines' gauges, in which the scorers believe: with it
load scheduling has the published times to first token below its knee, as whoever
looks emptiest gets all that comes until the next look."""
OPEN = 1024
"""Requests that are open at most, Envoy's default; others are refused at once.  From
40 a second on 1,500 are sent within the time of an answer, and no more than that is
answered: the report's charts have some 85 waiting and 40 running in each pod when all
are sent, nothing is sent after that, and stages begin 200 s apart, which is 1,000
answers at the published tokens a second."""
PREFILL_PACE = 1.1
"""Of published peaks: with it random scheduling has the published times to first
token at 3 and 10 requests a second, and the 0.23 s that are not modelled."""
SHARED_READ = 0.57
"""As of `Machine`: with it precise scheduling has the published mean gaps above 15
requests a second, where five users' requests read one group's prefix."""
RETOKENISED = 1.053
"""Prompts are texts of random tokens, and more tokens when they are read again: in
the report's charts of its pods, KV usage rises from 0 by 2.48 % for each request
alone with its group, 119 blocks of 4,802, and 113 would hold what was asked for."""


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


class Tracked(llmd.PrefixOverlap):
    """llm-d's precise prefix-cache-scorer as it was then: of who holds anything.

    The longest counts 1 and the shortest 0, or all 1 if they are equal
    (llm-d-inference-scheduler v0.2.1, `scorer/utils.go`).
    """

    def rate(self, signal: Floats) -> Floats:
        found = signal > 0
        low = signal.min(where=found, initial=np.inf)
        high = signal.max(initial=0.0)
        return np.where(found, 1.0 if low >= high else (signal - low) / (high - low), 0)


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
        3 * Tracked() + 2 * ScrapedUsage() + 2 * ScrapedQueue(),
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
    in ten are within 36 ms.  A floor and the pace of attention follow, for requests
    of 8,100 tokens halfway through their answers.  Prompts take `PREFILL_PACE` times
    as long as by peaks.
    """
    pair = attrs.evolve(
        H100,
        name="h100-x2",
        memory_bytes_per_s=2 * H100.memory_bytes_per_s,
        bf16_flops_per_s=2 * H100.bf16_flops_per_s,
    )
    machine = Machine.of(pair, QWEN3_32B)
    few, full = 8 * 8100, KV_TOKENS
    requests_s = machine.decode_s_per_request
    token_s = (36e-3 - 22e-3 - (full / 8100 - 8) * requests_s) / (full - few)
    floor = 22e-3 - few * token_s - 8 * requests_s
    return attrs.evolve(
        machine,
        decode_s_per_context_token=token_s,
        shared_read=SHARED_READ,
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
            rate=rate,
            requests=rate * seconds,
            system_tokens=round(6000 * RETOKENISED),
            question_tokens=round(1200 * RETOKENISED),
            in_rounds=True,
            seed=seed,
        )
        for job in load.jobs[:OPEN]:
            request = attrs.evolve(job.request, id=f"{number}/{job.id}")
            jobs.append(attrs.evolve(job, at=at + job.at, request=request))
        at += seconds + DRAINED_S
    return Workload(name="73-capacity", jobs=jobs)


def ladder(rates: list[int], gauges_s: float, seeds: int, jobs: int) -> None:
    """Print the ladder, which was measured once, beside medians of simulated ones."""
    loads = [whole_ladder(seed) for seed in range(1, seeds + 1)]
    runs = [(policy, load, gauges_s) for policy in SCORERS for load in loads]
    with ProcessPoolExecutor(jobs) as pool:
        stages = np.array([*pool.map(climbed, *zip(*runs, strict=True))])
    # Shape (policies, ladders, stages, figures).
    found = stages.reshape(len(SCORERS), seeds, len(STAGES), len(FIGURES))
    simulated, wanted = dict(zip(SCORERS, found, strict=True)), measured()
    heads = ("policy", "offered/s", *(f"{name} | simulated" for name in FIGURES[:-1]))
    print(f"| {' | '.join(heads)} |\n|{'---|' * (2 * len(heads) - 2)}")
    for policy in SCORERS:
        rows(policy, rates, wanted[policy], np.median(simulated[policy], axis=0))
    print()
    for policy in SCORERS:
        knees = [knee(climb[:, 2]) for climb in simulated[policy]]
        print(f"{policy}: knee at {knee(wanted[policy][:, 2])}, simulated {knees}")
        used = np.median(simulated[policy][:, :, -1], axis=0)
        print(f"  KV in use when the last is sent, %: {np.round(100 * used)}")
    high = np.array([*STAGES]) >= SATURATED
    speeds = {
        policy: np.vstack([wanted[policy][:, 0], simulated[policy][:, :, 0]]).T[high]
        for policy in SCORERS
    }
    for one, other in itertools.combinations(SCORERS, 2):
        print(f"{one}, {other}: {order(speeds[one], speeds[other])}")


FIGURES = ("output tokens/s", "TTFT mean, s", "TTFT p90, s", "ms a token", "KV in use")
SATURATED = 20
"""Requests a second from which random and load scheduling keep up no more."""


def measured() -> dict[str, Floats]:
    """Return of each policy what was published of it, shape (stages, figures - 1)."""
    if not (where := os.environ.get("LLMD_TRACES")):
        raise SystemExit("set LLMD_TRACES")
    with (Path(where) / "llmd_kvcache_measured_73.csv").open() as file:
        table = [row for row in csv.DictReader(file) if row["qps_offered"] != "all"]
    at = {(row["policy"], int(float(row["qps_offered"]))): row for row in table}
    names = ("output_tok_s", "ttft_mean_s", "ttft_p90_s", "itl_mean_s")
    # It counts two chunks a token.
    scale = np.array([1.0, 1.0, 1.0, 2e3])
    return {
        policy: scale
        * np.array([[float(at[policy, rate][n]) for n in names] for rate in STAGES])
        for policy in SCORERS
    }


def rows(policy: str, rates: list[int], wanted: Floats, simulated: Floats) -> None:
    """Print a policy's part of the table."""
    for stage, rate in enumerate(STAGES):
        if rate in rates:
            speed, *others = zip(wanted[stage], simulated[stage], strict=False)
            cells = [f"{one:.3g} | {other:.3g}" for one, other in others]
            line = " | ".join([policy, str(rate), compared(*speed), *cells])
            print(f"| {line} |")
    high = np.array([*STAGES]) >= SATURATED
    mean = compared(wanted[high, 0].mean(), simulated[high, 0].mean())
    print(f"| {policy} | {SATURATED} to 60, mean | {mean} |{' |' * 6}")


def compared(wanted: float, speed: float) -> str:
    return f"{wanted:.0f} | {speed:.0f} ({speed / wanted - 1:+.0%})"


def knee(tails: Floats) -> int | None:
    """Return the first rate at which TTFT p90 is five times that of the one before."""
    jumps = np.flatnonzero(tails[1:] > 5 * tails[:-1])
    return [*STAGES][jumps[0] + 1] if len(jumps) else None


def order(one: Floats, other: Floats) -> str:
    """Say how far policies were measured apart, and where ladders order them alike.

    Args:
        one: Output tokens a second, shape (rates, ladders); the first was measured.
        other: The same of another policy.
    """
    ahead, count = one > other, len(one)
    apart = np.log(one / other)
    error = apart[:, 0].std(ddof=1) / math.sqrt(count)
    alike = (ahead[:, :, None] == ahead[:, None, :]).sum(axis=0)
    others = alike[1:, 1:][np.triu_indices(len(alike) - 1, 1)]
    median = np.median(apart[:, 1:], axis=1) > 0
    return (
        f"{100 * apart[:, 0].mean():+.1f} +- {100 * error:.1f} % apart, simulated "
        f"{np.round(100 * apart[:, 1:].mean(axis=0), 1).tolist()}; of {count} rates as "
        f"measured at {alike[0, 1:].tolist()}, in the median at "
        f"{(median == ahead[:, 0]).sum()}; simulated ones alike at {others.tolist()}"
    )


def climbed(policy: str, load: Workload, gauges_s: float) -> list[tuple[float, ...]]:
    """Return for each stage its `FIGURES`."""
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
    return [stage_of(report, stages == number + 1) for number in range(len(STAGES))]


def stage_of(report: Report, mine: NDArray[np.bool_]) -> tuple[float, ...]:
    """Return the `FIGURES` of a stage, which is over with its last answer."""
    first, tokens = report.ttfts[mine], (report.output_tokens[mine] - 1).sum()
    began, sent = report.arrived[mine].min(), report.arrived[mine].max()
    speed = report.output_tokens[mine].sum() / (np.nanmax(report.ended[mine]) - began)
    return (
        float(speed),
        float(np.nanmean(first)),
        float(np.nanpercentile(first, 90)),
        float(1e3 * np.nansum((report.ended - report.first)[mine]) / tokens),
        float(np.mean([kv_usage(load, began, sent) for load in report.workers])),
    )


def kv_usage(load: WorkerLoad, began: float, at: float) -> float:
    """Return the part of a worker's blocks in use *at* a time of a stage."""
    runs = load.runs[(load.runs[:, 0] >= began) & (load.runs[:, 0] <= at)]
    return float(runs[-1, 5] / load.kv_blocks) if len(runs) else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=int, nargs="+", default=[*STAGES])
    parser.add_argument("--gauges-s", type=float, default=SCRAPED_S)
    parser.add_argument("--seeds", type=int, default=1, help="ladders simulated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    ladder(options.rates, options.gauges_s, options.seeds, options.jobs)


if __name__ == "__main__":
    main()
