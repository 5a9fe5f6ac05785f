"""A fleet and requests to try policies on."""

from __future__ import annotations

from typing import Any

from ..cluster import Cluster
from ..commands import Dispatch
from ..events import (
    BlocksStored,
    FirstToken,
    RequestArrived,
    SignalsReported,
    WorkerJoined,
)
from ..router import Router
from ..types import Request, Signals, Tier, Worker


def fleet(workers: int = 5, router: Router | None = None, seed: int = 0) -> Cluster:
    """Return a cluster at work: loads, caches and reports that differ.

    >>> cluster = fleet(workers=3)
    >>> cluster.view.workers.ids
    ('w0', 'w1', 'w2')
    """
    cluster = Cluster(seed=seed) if router is None else Cluster(router, seed=seed)
    for number in range(workers):
        worker = Worker(id=f"w{number}", block_tokens=16 << number % 2, kv_blocks=500)
        cluster.handle(WorkerJoined(0.0, worker))
        names = request("seen").hashes(worker.block_tokens)[: 2 + number]
        tier = Tier.CPU if number % 3 == 2 else Tier.GPU
        cluster.handle(BlocksStored(0.0, worker.id, names, worker.block_tokens, tier))
        if number % 2:
            signals = Signals(waiting_requests=number, kv_usage=0.1 * number)
            cluster.handle(SignalsReported(0.0, worker.id, signals))
    for number in range(2 * workers):
        new = request(f"load{number}", start=1000 * number, tokens=80 + 40 * number)
        for command in cluster.handle(RequestArrived(1.0, new)):
            if isinstance(command, Dispatch) and number % 3:
                chosen = command.decision.decode
                cluster.handle(FirstToken(1.0, chosen, new.id, 0))
    return cluster


def request(id: str = "r", start: int = 0, tokens: int = 300, **names: Any) -> Request:
    """Return a request for *tokens* consecutive token ids."""
    return Request(
        id=id, prompt=range(start, start + tokens), max_new_tokens=16, **names
    )
