"""Measure what waiting in line costs, with 10 to 100,000 others in it.

python benchmarks/balancer.py

`enqueue_dispatch` is one request in and one out: admission, filing, charging,
the turn of a tenant, unfiling; routing and booking are not in it.  `cancel`
takes a random one out (and puts another in, not counted).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from statistics import median

import numpy as np

import llmd
from llmd import balancer as b
from llmd.booking import Booking
from llmd.decision import Decision
from llmd.view import View
from llmd.waiting import WaitingRequests

SIZES = (10, 1_000, 100_000)
MOST = 1_000_000
ROUNDS, EACH = 15, 200


def fcfs() -> b.QueueBalancer:
    return b.Fcfs(max_waiting=MOST)


def bands_over_vtc(*orders: b.QueueBalancer) -> b.Bands:
    plain = b.Fcfs(max_waiting=MOST)
    chat, batch = orders or (plain, plain)
    return b.Bands(
        [
            b.Band(order=b.Vtc(chat), max_wait=1e6, max_requests=MOST),
            b.Band(order=b.Vtc(batch), max_wait=1e6, max_requests=MOST, ceiling=0.9),
        ]
    )


def everything() -> b.QueueBalancer:
    orders = b.Edf(max_waiting=MOST), b.Fcfs(max_waiting=MOST)
    gates = b.QueueFull(requests=MOST), b.RateLimit(requests_per_min=1e9)
    return b.FlowControl(bands_over_vtc(*orders), gates, [b.AimdRoom(itl_s=0.05)])


KINDS: tuple[tuple[str, Callable[[], b.QueueBalancer]], ...] = (
    ("", bands_over_vtc),
    (".fcfs", fcfs),
    (".everything", everything),
)


class Line:
    """A queue as a cluster drives it, without the rest of the cluster."""

    def __init__(self, balancer: b.QueueBalancer, length: int) -> None:
        cluster = llmd.Cluster(balancer=balancer)
        cluster.handle(llmd.events.WorkerJoined(0.0, llmd.Worker(id="w")))
        self.view: View = cluster.view
        self.balancer, self.line = balancer, WaitingRequests(balancer, lambda r: ("",))
        self.view.waiting = self.line
        self.rng, self.count = random.Random(0), 0
        self.bookings: dict[str, Booking] = {}
        for _ in range(length):
            self.enqueue(self.request())

    def request(self) -> llmd.Request:
        self.count += 1
        request = llmd.Request(
            id=f"r{self.count}",
            prompt=(1, 2, 3),
            tenant=f"t{self.rng.randrange(50)}",
            priority=self.rng.randrange(2),
            deadline=math.inf if self.rng.random() < 0.5 else 1e6 + self.rng.random(),
        )
        booking = Booking(request, Decision("w"), 3, 3, 3, 0.0, 0, self.view.now)
        self.bookings[request.id] = booking
        return request

    def enqueue(self, request: llmd.Request) -> None:
        verdict = self.balancer.admit(request, self.view)
        assert verdict.admitted, verdict.explain()
        self.line.push(request, self.view, since=self.view.now)
        self.balancer.admitted(request, self.view)

    def dispatch(self) -> None:
        self.line.refresh(self.view)
        _, lane = min(self.line.ranks())
        entry = self.line.head(lane)
        assert entry is not None
        id = entry.request.id
        self.balancer.dispatched(self.bookings.pop(id), self.view)
        self.line.touch(entry.flow)
        self.line.remove(id, self.view)


def enqueue_dispatch_us(line: Line) -> float:
    rounds = []
    for _ in range(ROUNDS):
        requests = [line.request() for _ in range(EACH)]
        start = time.process_time()
        for request in requests:
            line.enqueue(request)
            line.dispatch()
        rounds.append((time.process_time() - start) / EACH * 1e6)
    return median(rounds)


def cancel_us(line: Line) -> float:
    rounds = []
    ids = [request.id for request in line.line]
    for _ in range(ROUNDS):
        picked = line.rng.sample(range(len(ids)), min(EACH, len(ids)))
        start = time.process_time()
        for place in picked:
            line.line.remove(ids[place], line.view)
            line.line.refresh(line.view)
        rounds.append((time.process_time() - start) / len(picked) * 1e6)
        for place in picked:
            request = line.request()
            ids[place] = request.id
            line.enqueue(request)
    return median(rounds)


def measure() -> dict[str, float]:
    figures: dict[str, float] = {}
    for suffix, make in KINDS:
        for size in SIZES:
            line = Line(make(), size)
            name = f"balancer.enqueue_dispatch.us{suffix}.{size}"
            figures[name] = enqueue_dispatch_us(line)
            figures[f"balancer.cancel.us{suffix}.{size}"] = cancel_us(line)
    return figures


if __name__ == "__main__":
    print(f"numpy {np.__version__}")
    for name, value in measure().items():
        print(f"{name:48} {value:8.1f}")
