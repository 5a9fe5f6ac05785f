"""One worker of a few places, driven by hand, for balancers to be asked by."""

import pytest

import llmd
from llmd import commands as c
from llmd import events as e


class Shop:
    """A cluster of one model whose requests run until told otherwise."""

    def __init__(self, balancer, places=3, workers=1, **worker):
        self.now, self.count, self.places = 0.0, 0, places
        self.cluster = llmd.Cluster(balancer=balancer)
        self.sent: list[str] = []
        self.failed: dict[str, Exception] = {}
        self.shed: list[str] = []
        self.where: dict[str, str] = {}
        self.requests: dict[str, llmd.Request] = {}
        for number in range(workers):
            facts = {"max_running": places, **worker}
            joins = llmd.Worker(id=f"w{number}", **facts)
            self.feed(e.WorkerJoined(self.now, joins))

    def feed(self, event):
        for command in self.cluster.handle(event):
            match command:
                case c.Dispatch(request=request, decision=decision):
                    self.sent.append(request.id)
                    self.where[request.id] = decision.decode
                case c.Fail(request=request, error=error):
                    self.failed[request.id] = error
                    self.where.pop(request.id, None)
                case c.Requeue(request=request):
                    self.shed.append(request.id)
                    self.where.pop(request.id, None)
        return self

    def arrive(self, tenant="", prompt=1, id="", **fields):
        self.count += 1
        tokens = prompt if not isinstance(prompt, int) else range(prompt)
        # Prompts differ unless given in full, so that nothing is cached.
        salt = "" if not isinstance(prompt, int) else f"{self.count}"
        fields = {"salt": salt, "arrived_at": self.now, **fields}
        request = llmd.Request(
            id=id or f"{tenant}{self.count}", prompt=tokens, tenant=tenant, **fields
        )
        self.requests[request.id] = request
        self.feed(e.RequestArrived(self.now, request))
        return request.id

    def token(self, id, tokens=1):
        if self.cluster.books.get(id).streamed:
            self.feed(e.TokensGenerated(self.now, self.where[id], id, tokens))
        else:
            self.feed(e.FirstToken(self.now, self.where[id], id))

    def end(self, id):
        self.feed(e.RequestEnded(self.now, self.where.pop(id), id))

    def cancel(self, id):
        self.where.pop(id, None)
        self.feed(e.RequestCancelled(self.now, id))

    def wait(self, seconds):
        self.now += seconds
        self.feed(e.Tick(self.now))

    def drain(self):
        """End what runs, oldest first, until nothing waits; return the order."""
        order = []
        while self.where:
            id = next(iter(self.where))
            order.append(id)
            self.end(id)
        return order

    @property
    def waiting(self):
        return [request.id for request in self.cluster.view.waiting]


@pytest.fixture
def shop():
    return Shop
