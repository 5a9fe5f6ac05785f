"""llm-d's benchmarks of four routing strategies, measured and simulated.

    python benchmarks/ladder.py [--only 37] [--seeds 5] [--rates 3 15 20 30 ...]

Prints the tables of docs/explanation/simulator-checked.md beside what llm-d measured
(tests/data).  A ladder takes a minute on a core.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from _ladders import BLOCK_TOKENS, LADDERS, SCRAPED_S, Ladder
from numpy.typing import NDArray

import llmd
from llmd.router.interface import Floats
from llmd.sim import EngineSettings, Report, WorkerLoad, fleet, simulate

FIGURES = ("output tokens/s", "TTFT mean, s", "TTFT p90, s", "ms a token", "KV in use")


def simulated(
    ladder: Ladder, seeds: int, gauges_s: float, jobs: int
) -> dict[str, Floats]:
    """Climb with each policy and seed; shape of each (seeds, stages, figures)."""
    runs = [
        (ladder.name, policy, seed, gauges_s)
        for policy in ladder.policies
        for seed in range(1, seeds + 1)
    ]
    with ProcessPoolExecutor(jobs) as pool:
        stages = np.array([*pool.map(climbed, *zip(*runs, strict=True))])
    found = stages.reshape(-1, seeds, *stages.shape[1:])
    return dict(zip(ladder.policies, found, strict=True))


def climbed(
    name: str, policy: str, seed: int, gauges_s: float = SCRAPED_S
) -> list[tuple[float, ...]]:
    """Return for each stage its `FIGURES`."""
    ladder = LADDERS[name]
    router, index = ladder.policies[policy]
    report = simulate(
        llmd.Cluster(router=router, index=index()),
        ladder.load(seed),
        workers=fleet(
            ladder.pods,
            block_tokens=BLOCK_TOKENS,
            kv_tokens=ladder.kv_tokens,
            max_running=1024,
        ),
        machine=ladder.machine(),
        settings=EngineSettings(step_tokens=8192),
        signals_s=gauges_s,
    )
    stages = np.array([int(id.split("/")[0]) for id in report.ids])
    numbers = range(1, len(ladder.stages) + 1)
    return [stage_of(report, stages == number) for number in numbers]


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


def tell(ladder: Ladder, rates: list[int], found: Mapping[str, Floats]) -> None:
    """Print a ladder, which was measured once, beside medians of simulated ones."""
    wanted = ladder.measured()
    heads = ("policy", "offered/s", *(f"{name} | simulated" for name in FIGURES[:-1]))
    print(f"| {' | '.join(heads)} |\n|{'---|' * (2 * len(heads) - 2)}")
    high = np.array([*ladder.stages]) >= ladder.full
    for policy, climbs in found.items():
        figures = wanted[policy], np.median(climbs, axis=0)
        at = dict(zip(ladder.stages, zip(*figures, strict=True), strict=True))
        rows(policy, at, rates)
        mean = compared(*[one[high, 0].mean() for one in figures])
        last = f"{ladder.full} to {max(ladder.stages)}"
        print(f"| {policy} | {last}, mean | {mean} |{' |' * 6}")
    print()
    for policy, climbs in found.items():
        knees = [knee(ladder, climb[:, 2]) for climb in climbs]
        was = knee(ladder, wanted[policy][:, 2])
        print(f"{policy}: knee at {was}, simulated {knees}")
        used = np.median(climbs[:, :, -1], axis=0)
        print(f"  KV in use when the last is sent, %: {np.round(100 * used)}")
    for figure, name in enumerate(FIGURES[:2]):
        print(f"\nBy {name}, at {ladder.full} a second and more:")
        by = {
            policy: np.vstack([wanted[policy][:, figure], climbs[:, :, figure]])
            for policy, climbs in found.items()
        }
        for one, other in itertools.combinations(by, 2):
            print(f"{one}, {other}: {order(by[one].T[high], by[other].T[high])}")


def rows(policy: str, by_rate: Mapping[int, tuple], rates: list[int]) -> None:
    """Print a policy's part of the table, (measured, simulated) of each rate."""
    for rate, figures in by_rate.items():
        if not rates or rate in rates:
            speed, *others = zip(*figures, strict=False)
            cells = [f"{one:.3g} | {other:.3g}" for one, other in others]
            line = " | ".join([policy, str(rate), compared(*speed), *cells])
            print(f"| {line} |")


def compared(wanted: float, speed: float) -> str:
    return f"{wanted:.0f} | {speed:.0f} ({speed / wanted - 1:+.0%})"


def knee(ladder: Ladder, tails: Floats) -> int | None:
    """Return the first rate at which TTFT p90 is five times that of the one before."""
    jumps = np.flatnonzero(tails[1:] > 5 * tails[:-1])
    return [*ladder.stages][jumps[0] + 1] if len(jumps) else None


def order(one: Floats, other: Floats) -> str:
    """Say how far policies were measured apart, and where ladders order them alike.

    Args:
        one: A figure of a policy, shape (rates, ladders); the first was measured.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=[*LADDERS])
    parser.add_argument("--rates", type=int, nargs="+", default=[], help="in the table")
    parser.add_argument("--gauges-s", type=float, default=SCRAPED_S)
    parser.add_argument("--seeds", type=int, default=1, help="ladders simulated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    for ladder in [LADDERS[options.only]] if options.only else LADDERS.values():
        print(f"\nllm-d's {ladder.name}-capacity benchmark\n")
        found = simulated(ladder, options.seeds, options.gauges_s, options.jobs)
        tell(ladder, options.rates, found)


if __name__ == "__main__":
    main()
