"""What a tick costs, and what policies cost and keep under load that moves.

    python benchmarks/autoscaler.py            # one tick, in microseconds
    python benchmarks/autoscaler.py compare [--seed N] [--plot PATH] [--json PATH]

`compare` runs policies in the simulator on two kinds of load and three cold
starts, beside the best static count, found by search.
"""

import argparse
import json
import math
import time

import attrs
import numpy as np

import llmd
from llmd import events as e
from llmd.autoscaler import (
    Autoscaler,
    Count,
    Forecast,
    HoltWinters,
    Kpa,
    Largest,
    LatencySlo,
    Percent,
    Quantile,
    Rules,
    TargetConcurrency,
)
from llmd.autoscaler.hpa import AverageValue, External, Hpa, HpaSpec, Pods
from llmd.sim import Slo, fleet, simulate, workloads
from llmd.sim.sequence import EngineSettings

SLO = Slo(ttft_s=3.0, tpot_s=0.15)
MOST = 24
REQUESTS_AT_ONCE = 16
# What 90 % of a window's moments would have needed keeps the promise to 95 % of
# the requests, as a queue that is short for a moment delays few of them; a
# smaller wish lasts as long as a lull may.
PART, PATIENCE = 0.90, 300.0
# Eight times the step times of a 7B model on an H200: a worker bears about
# one request a second of these, so that hours of load fit in minutes.
FAST = llmd.Machine()
SLOW = attrs.evolve(
    FAST,
    name="8 x slower",
    **{
        name: 8 * getattr(FAST, name)
        for name in (
            "prefill_floor_s",
            "decode_floor_s",
            "prefill_s_per_token",
            "prefix_s_per_token",
            "decode_s_per_request",
            "decode_s_per_context_token",
        )
    },
)


# One tick --------------------------------------------------------------------


def measure() -> dict[str, float]:
    """Return microseconds of one tick, policy and rules, by fleet size."""
    figures = {}
    for size in (8, 1000):
        policy = TargetConcurrency(
            requests_per_worker=8, max_workers=2 * size, tolerance=0.1
        )
        cluster = llmd.Cluster(autoscaler=policy)
        for row in range(size):
            cluster.handle(e.WorkerJoined(0.0, llmd.Worker(id=f"w{row:04}")))
        for row in range(8 * size):
            request = llmd.Request(id=f"r{row}", prompt=[row % 500])
            cluster.handle(e.RequestArrived(0.0, request))
        times = []
        for row in range(3000):
            begun = time.perf_counter()
            cluster.handle(e.Tick(0.1 * (row + 1)))
            times.append(time.perf_counter() - begun)
        figures[f"autoscaler.tick.us.{size}"] = 1e6 * float(np.median(times))
    return figures


# Load ------------------------------------------------------------------------


def daily(hours: float = 1.0, low: float = 0.5, high: float = 4.0, seed: int = 0):
    """Make arrivals whose rate swings from *low* to *high* and back in an hour."""
    rng = np.random.default_rng(seed)
    span = 3600.0 * hours
    times = np.cumsum(rng.exponential(1 / high, int(2 * span * high)))
    times = times[times < span]
    rate = (low + high) / 2 - (high - low) / 2 * np.cos(2 * np.pi * times / 3600.0)
    return _requests("daily", times[rng.random(len(times)) < rate / high])


def burst(hours: float = 1.0, rate: float = 1.5, variation: float = 6.0, seed: int = 0):
    """Make arrivals with gaps of a coefficient of variation over 5."""
    rng = np.random.default_rng(seed)
    shape = variation**-2
    times = np.cumsum(rng.gamma(shape, 1 / (rate * shape), int(7200 * hours * rate)))
    return _requests("burst", times[times < 3600.0 * hours])


def _requests(name: str, times):
    made = workloads.batch(
        requests=len(times), prompt_tokens=2000.0, answer_tokens=200.0
    )
    return attrs.evolve(made.arriving(times), name=name)


# Policies --------------------------------------------------------------------


def policies(cold: float):
    """Return what makes each policy, tuned by one rule of thumb for every load."""
    bounds = {"min_workers": 1, "max_workers": MOST}
    # At most the double within a cold start: more would answer a queue that
    # those on their way will have worked off.
    double = Rules(rates=(Percent(100, cold), Count(2, cold)))
    patient = {**bounds, "patience": PATIENCE + cold, "up": double}
    queue = HpaSpec(
        max_replicas=MOST,
        metrics=(
            External("inference_extension_flow_control_queue_size", AverageValue(5)),
            Pods("vllm:num_requests_running", AverageValue(REQUESTS_AT_ONCE // 2)),
        ),
    )
    return {
        "HPA queue depth": lambda: Hpa(spec=queue),
        "KPA": lambda: Kpa(requests_per_worker=REQUESTS_AT_ONCE / 2, **bounds),
        "SLO": lambda: Largest(policies=latency(), **patient),
        "SLO + forecast": lambda: Largest(
            policies=(*latency(), forecast(cold)), **patient
        ),
    }


def latency() -> tuple[Autoscaler, ...]:
    """Keep the promise on average load, and in bursts as they recur."""
    promise = {"machine": SLOW, "ttft": SLO.ttft_s, "itl": SLO.tpot_s}
    steady = LatencySlo(**promise, backlog=False, max_workers=MOST)
    bursty = LatencySlo(**promise, headroom=1.0, max_workers=MOST)
    return steady, Quantile(policy=bursty, part=PART, window=900.0)


def forecast(cold: float) -> Autoscaler:
    """Look as far ahead as a new worker takes to start, and a minute."""
    return Forecast(
        rate_per_worker=0.8,
        cold_start=cold + 60.0,
        step=30.0,
        spread=0.0,
        series=HoltWinters(level=0.35, trend=0.15),
    )


def run(policy: Autoscaler | None, workload, workers: int, cold: float):
    """Simulate and return figures, and the course of the count."""
    course = []

    def note(item):
        if isinstance(item, e.Tick):
            ready = int(cluster.view.workers.supply().sum())
            course.append((item.at, ready))

    cluster = llmd.Cluster(
        router=llmd.LeastLoaded(),
        balancer=llmd.Fcfs(max_running=REQUESTS_AT_ONCE),
        autoscaler=policy,
        observer=note if policy is not None else None,
    )
    report = simulate(
        lambda: cluster,
        workload,
        workers=fleet(workers, max_running=REQUESTS_AT_ONCE),
        machine=SLOW,
        settings=EngineSettings(cold_start_s=cold),
    )
    counts = np.array([count for _, count in course] or [workers])
    steps = np.sign(np.diff(counts))
    steps = steps[steps != 0]
    hours = workload.span_s / 3600.0
    figures = {
        "attainment": float(report.good(SLO).mean()),
        "worker_hours": report.worker_hours,
        "flaps_an_hour": float((np.diff(steps) != 0).sum() / hours),
        "ttft_p95_s": report.ttft(95),
    }
    return figures, course


def best_static(workload):
    """Find the fewest workers, all the time, that keep 95 % of requests."""
    low, high = 0, MOST
    found = {}
    while high - low > 1:
        middle = (low + high) // 2
        found[middle], _ = run(None, workload, middle, 0.0)
        enough = found[middle]["attainment"] >= 0.95
        low, high = (low, middle) if enough else (middle, high)
    if high not in found:
        found[high], _ = run(None, workload, high, 0.0)
    return high, found[high]


def compare(seed: int = 0, colds=(30.0, 60.0, 200.0)):
    """Yield (load, cold start, policy, figures, course), the static one first."""
    for workload in (burst(seed=seed), daily(seed=seed)):
        workers, figures = best_static(workload)
        yield workload.name, math.nan, f"static {workers}", figures, []
        for cold in colds:
            for name, make in policies(cold).items():
                yield (
                    workload.name,
                    cold,
                    name,
                    *run(make(), workload, workers, cold),
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", choices=["tick", "compare"], default="tick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="PATH")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args()
    if options.what == "tick":
        print(json.dumps(measure(), indent=1))
        return
    rows, best = [], math.nan
    print("load   cold s  policy           kept   hours  of best  flaps/h  ttft p95")
    for load, cold, policy, figures, course in compare(options.seed):
        if cold != cold:
            best = figures["worker_hours"]
        share = figures["worker_hours"] / best
        rows.append((load, cold, policy, {**figures, "of_static": share}, course))
        print(
            f"{load:6} {cold:6.0f}  {policy:15} {figures['attainment']:6.1%}"
            f" {figures['worker_hours']:7.2f} {share:8.2f}"
            f" {figures['flaps_an_hour']:8.1f} {figures['ttft_p95_s']:9.2f}",
            flush=True,
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump([row[:4] for row in rows], file, indent=1)
    if options.plot:
        plot(rows, options.plot)


def plot(rows, path: str) -> None:
    """Draw the course of each policy, a panel for each load and cold start."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    panels = sorted({(row[0], row[1]) for row in rows if row[4]})
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 2.2 * len(panels)), squeeze=False
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        for load, cold, policy, figures, course in rows:
            if (load, cold) == panel:
                at, count = zip(*course, strict=True)
                label = f"{policy}: {figures['attainment']:.1%}"
                axis.step(np.array(at) / 60, count, label=label, lw=1)
        axis.set_title(f"{panel[0]}, cold start {panel[1]:.0f} s", fontsize=9)
        axis.set_ylabel("workers")
        axis.legend(fontsize=6, loc="upper right")
    axes[-1, 0].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
