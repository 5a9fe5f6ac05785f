"""All routers and indexes of the package hold to the published contracts."""

import pytest

import llmd
from llmd import router as r
from llmd.router.rivals import RIVALS
from llmd.testing import Cheated, PrefixIndexContract, RouterContract, sealed

ROUTERS = {
    "random": llmd.Random,
    "round robin": llmd.RoundRobin,
    "least loaded": llmd.LeastLoaded,
    "least work": llmd.LeastWork,
    "power of two": llmd.PowerOfTwo,
    "session": llmd.SessionAffinity,
    "first token": llmd.EarliestFirstToken,
    "softmax": lambda: r.Softmax(router=llmd.LeastWork(), temperature=100.0),
    "softmax, relative": lambda: r.Softmax(
        router=llmd.EarliestFirstToken(), temperature=0.5, relative=True
    ),
    "explore": lambda: r.Explore(router=llmd.LeastWork(), epsilon=0.5),
    "gate": lambda: r.LoadGate(router=llmd.SessionAffinity(), ahead_requests=1),
    "cold": lambda: r.SpreadCold(router=llmd.EarliestFirstToken()),
    "barrier": lambda: r.KVBarrier(router=llmd.LeastWork()),
    "surcharge": lambda: r.Surcharge(
        router=llmd.LeastWork(), seconds=lambda worker: float(worker.id == "w1")
    ),
    "stale": lambda: r.Stale(router=llmd.LeastWork()),
    "breaker": lambda: r.CircuitBreaker(router=llmd.LeastWork()),
    "shadow": lambda: r.Shadow(
        router=llmd.EarliestFirstToken(), others={"loaded": llmd.LeastLoaded()}
    ),
    "stack": lambda: r.CircuitBreaker(
        router=r.LoadGate(router=r.KVBarrier(router=llmd.EarliestFirstToken()))
    ),
    **RIVALS,
}


class TestRouters(RouterContract):
    @pytest.fixture(autouse=True, params=ROUTERS, ids=lambda name: name)
    def _which(self, request):
        self.which = request.param

    def make(self):
        return ROUTERS[self.which]()


class TestIndexes(PrefixIndexContract):
    @pytest.fixture(
        autouse=True, params=[llmd.ExactIndex, llmd.GuessedIndex, llmd.BlendedIndex]
    )
    def _which(self, request):
        self.which = request.param

    def make(self):
        return self.which()


class Broken(llmd.Router):
    """Fails the contract in a chosen way."""

    def __init__(self, how):
        self.how = how
        self.asked = 0

    def cost(self, request, view):
        import random
        import time

        import numpy as np

        count = len(view.workers)
        self.asked += 1
        match self.how:
            case "NaN":
                return np.full(count, np.nan)
            case "shape":
                return np.zeros(count + 1)
            case "clock":
                return np.zeros(count) + time.monotonic()
            case "random":
                return np.array([random.random() for _ in range(count)])
            case "raises":
                raise RuntimeError("no")


@pytest.mark.parametrize(
    ("how", "caught_by"),
    [
        ("NaN", "test_prices_every_worker_with_a_number"),
        ("shape", "test_prices_every_worker_with_a_number"),
        ("clock", "test_uses_no_clock_and_no_global_randomness"),
        ("random", "test_uses_no_clock_and_no_global_randomness"),
        ("random", "test_is_deterministic"),
        ("raises", "test_serves_a_cluster"),
    ],
)
def test_the_contract_catches_what_is_broken(how, caught_by):
    class Contract(RouterContract):
        def make(self):
            return Broken(how)

    with pytest.raises((AssertionError, llmd.errors.PolicyError, RuntimeError)):
        getattr(Contract(), caught_by)()


def test_sealed_opens_again():
    import time

    with pytest.raises(Cheated), sealed():
        time.time()
    assert time.time() > 0
