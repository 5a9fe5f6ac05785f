"""A fleet whose load is whatever a test says."""

import pytest

import llmd
from llmd import events as e


class Bench:
    """A cluster with workers that hold requests and never answer."""

    def __init__(self, workers=1, **facts):
        self.cluster = llmd.Cluster(balancer=llmd.Fcfs(max_running=10_000))
        self.facts = facts
        self.names = iter(range(10**9))
        self.now = 0.0
        self.running = []
        self.there = []
        self.fit(workers)

    @property
    def view(self):
        return self.cluster.view

    def join(self, state=llmd.State.READY):
        name = f"w{next(self.names):04}"
        worker = llmd.Worker(id=name, state=state, **self.facts)
        self.cluster.handle(e.WorkerJoined(self.now, worker))
        self.there.append(name)
        return name

    def change(self, name, state):
        self.cluster.handle(e.WorkerChanged(self.now, name, state=state))

    def fit(self, workers):
        """Have exactly so many ready workers."""
        while len(self.there) < workers:
            self.join()
        while len(self.there) > workers:
            self.cluster.handle(e.WorkerLeft(self.now, self.there.pop()))

    def arrive(self, requests=1, prompt_tokens=100):
        for _ in range(requests):
            number = next(self.names)
            name, prompt = f"r{number}", [number, *[1] * (prompt_tokens - 1)]
            request = llmd.Request(id=name, prompt=prompt)
            self.cluster.handle(e.RequestArrived(self.now, request))
            self.running.append(name)

    def load(self, requests):
        """Have exactly so many requests in flight."""
        self.arrive(max(requests - len(self.running), 0))
        while len(self.running) > requests:
            name = self.running.pop()
            self.cluster.handle(e.RequestCancelled(self.now, name))

    def wait(self, seconds):
        self.now += seconds
        self.view.advance(self.now)


@pytest.fixture
def make_bench():
    return Bench
