"""peers.*: how evenly two routers that know nothing of each other load a fleet.

A model in virtual time: two routers over eight workers that compute one prompt
after the other; each arrival comes to the one or the other by chance, and long
prompts are rare.  Measured is the wait that a request finds at its worker beyond
the wait at the least loaded one, with what a router knows of the other: nothing,
all it said up to 50 ms ago, or everything (one router).
"""

from __future__ import annotations

import heapq
import statistics
from typing import Any

import numpy as np

import llmd
from llmd import events as e
from llmd.events import PeerReported

WORKERS = 8
ARRIVALS = 4000
UTILISATION = 0.7
TOKENS_PER_S = 20_000.0
NO_BLOCKS = 1 << 20  # blocks longer than any prompt: nothing is cached


def measure() -> dict[str, float]:
    results = {}
    for name, routers, interval in (
        ("one", 1, None),
        ("two.alone", 2, None),
        ("two.sharing", 2, 0.05),
    ):
        waits = [_excess_wait(routers, interval, seed) for seed in range(3)]
        results[f"peers.{name}.excess_wait_ms"] = statistics.median(waits) * 1e3
    results["peers.alone_over_sharing"] = (
        results["peers.two.alone.excess_wait_ms"]
        / results["peers.two.sharing.excess_wait_ms"]
    )
    return results


def _excess_wait(routers: int, interval: float | None, seed: int) -> float:
    """Return the mean seconds a request waits for nothing."""
    rng = np.random.default_rng(seed)
    clusters = [llmd.Cluster(llmd.LeastWork(), seed=seed + n) for n in range(routers)]
    for cluster in clusters:
        for number in range(WORKERS):
            worker = llmd.Worker(
                id=f"w{number}", max_running=10_000, block_tokens=NO_BLOCKS
            )
            cluster.handle(e.WorkerJoined(0.0, worker))
    free_at = dict.fromkeys((f"w{number}" for number in range(WORKERS)), 0.0)
    sizes = np.minimum(rng.lognormal(7.0, 1.2, ARRIVALS), 60_000).astype(int) + 16
    rate = UTILISATION * WORKERS * TOKENS_PER_S / sizes.mean()
    ends: list[tuple[float, int, int, str, str]] = []
    excess, now, told, sequence = [], 0.0, 0.0, 0
    for number, size in enumerate(sizes.tolist()):
        now += rng.exponential(1.0 / rate)
        while ends and ends[0][0] <= now:
            at, _, router, worker, id = heapq.heappop(ends)
            _end(clusters[router], at, worker, id)
        if interval is not None and now >= told + interval:
            told, sequence = now, sequence + 1
            _tell(clusters, now, sequence)
        router = int(rng.integers(routers))
        prompt = llmd.Prompt.named([], NO_BLOCKS, size)
        request = llmd.Request(id=f"r{number}", prompt=prompt)
        (sent,) = _arrive(clusters[router], now, request)
        worker = sent.decision.decode
        waits = {id: max(at - now, 0.0) for id, at in free_at.items()}
        excess.append(waits[worker] - min(waits.values()))
        free_at[worker] = now + waits[worker] + size / TOKENS_PER_S
        heapq.heappush(ends, (free_at[worker], number, router, worker, request.id))
    return float(np.mean(excess))


def _arrive(cluster: llmd.Cluster, at: float, request: llmd.Request) -> list[Any]:
    return cluster.handle(e.RequestArrived(max(at, cluster.view.now), request))


def _end(cluster: llmd.Cluster, at: float, worker: str, id: str) -> None:
    at = max(at, cluster.view.now)
    cluster.handle(e.FirstToken(at, worker, id, 0))
    cluster.handle(e.RequestEnded(at, worker, id))


def _tell(clusters: list[llmd.Cluster], now: float, sequence: int) -> None:
    said = [cluster.peers.own() for cluster in clusters]
    for number, cluster in enumerate(clusters):
        for other, loads in enumerate(said):
            if other != number:
                at = max(now, cluster.view.now)
                cluster.handle(PeerReported(at, f"p{other}", sequence, loads, 1.0))


if __name__ == "__main__":
    print(measure())
