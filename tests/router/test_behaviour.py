"""What each router of ours does that the others do not."""

import attrs
import numpy as np
import pytest

import llmd
from llmd import commands as c
from llmd import events as e
from llmd import router as r
from llmd.errors import PolicyError
from llmd.machines import Machine


@attrs.define
class Fixed(llmd.Router):
    """Prices workers by their id."""

    prices: dict

    def cost(self, request, view):
        return np.array([self.prices[id] for id in view.workers.ids], dtype=float)


def picks(router, request, view, times=400):
    return [router.route(request, view).decode for _ in range(times)]


class TestSoftmax:
    def test_draws_by_cost_over_temperature(self, stub, ask):
        router = r.Softmax(router=Fixed({"w0": 0.0, "w1": 1.0}), temperature=0.5)
        share = picks(router, ask(), stub(GPU=[0, 0]).view, 4000).count("w0") / 4000
        assert share == pytest.approx(1 / (1 + np.exp(-2.0)), abs=0.02)

    def test_cold_is_the_cheapest_hot_is_anyone(self, stub, ask):
        prices = Fixed({"w0": 3.0, "w1": 1.0, "w2": np.inf})
        view = stub(GPU=[0, 0, 0]).view
        assert set(picks(r.Softmax(router=prices, temperature=1e-9), ask(), view)) == {
            "w1"
        }
        hot = set(picks(r.Softmax(router=prices, temperature=1e9), ask(), view))
        assert hot == {"w0", "w1"}

    def test_relative_does_not_care_for_the_unit(self, stub, ask):
        view = stub(GPU=[0, 0, 0]).view
        for scale in (1e-3, 1.0, 1e6):
            router = r.Softmax(router=llmd.Random(), temperature=0.5, relative=True)
            costs = np.array([0.0, 1.0, 2.0]) * scale
            assert router.chances(costs) == pytest.approx(
                np.exp([0, -1, -2]) / np.exp([0, -1, -2]).sum()
            )
        assert router.chances(np.zeros(3)) == pytest.approx([1 / 3] * 3)
        assert router.route(ask(), view) is not None

    def test_no_temperature_is_refused(self):
        with pytest.raises(PolicyError):
            r.Softmax(router=llmd.Random(), temperature=0.0)


def test_explore_tries_others_at_its_rate_but_none_that_is_ruled_out(stub, ask):
    prices = Fixed({"w0": 0.0, "w1": 5.0, "w2": np.inf})
    router = r.Explore(router=prices, epsilon=0.2)
    found = picks(router, ask(), stub(GPU=[0, 0, 0]).view, 4000)
    assert found.count("w1") / 4000 == pytest.approx(0.1, abs=0.02)
    assert "w2" not in found


class TestLoadGate:
    def test_affinity_gives_way_to_load(self, stub, ask):
        router = r.LoadGate(router=Fixed({"w0": 0.0, "w1": 1.0}), ahead_requests=4)
        view = stub(running_requests=[5, 1]).view
        assert set(picks(router, ask(), view, 5)) == {"w0"}
        view = stub(running_requests=[6, 1]).view
        assert set(picks(router, ask(), view, 5)) == {"w1"}

    def test_a_ruled_out_worker_stays_out(self, stub, ask):
        router = r.LoadGate(router=Fixed({"w0": 0.0, "w1": np.inf}), ahead_requests=0)
        view = stub(running_requests=[9, 0]).view
        assert set(picks(router, ask(), view, 5)) == {"w0"}


class TestSpreadCold:
    def test_cold_requests_go_round(self, stub, ask):
        router = r.SpreadCold(router=Fixed(dict.fromkeys(["w0", "w1", "w2"], 1.0)))
        found = picks(router, ask(), stub(GPU=[0, 0, 0]).view, 9)
        assert [found.count(id) for id in ("w0", "w1", "w2")] == [3, 3, 3]
        assert len(set(found[:3])) == 3

    def test_warm_requests_and_costly_workers_are_left_alone(self, stub, ask):
        router = r.SpreadCold(router=Fixed({"w0": 1.0, "w1": 1.05, "w2": 9.0}))
        assert set(picks(router, ask(), stub(GPU=[0, 0, 16]).view, 9)) == {"w0"}
        assert set(picks(router, ask(), stub(GPU=[0, 0, 0]).view, 9)) == {"w0", "w1"}


class TestKVBarrier:
    def test_rises_without_bound_and_only_beyond_the_knee(self, stub, ask):
        router = r.KVBarrier(router=llmd.Random(), seconds=1.0, knee=0.5)
        tokens = [int(16_000 * part) - 161 for part in (0.1, 0.5, 0.75, 0.9, 0.99)]
        costs = router.cost(ask(), stub(context_tokens=tokens).view)
        assert costs[:2].tolist() == [0.0, pytest.approx(0.0, abs=1e-6)]
        want = [(u - 0.5) ** 2 / (1 - u) for u in (0.75, 0.9, 0.99)]
        assert costs[2:] == pytest.approx(want, rel=1e-3)
        assert np.diff(np.diff(costs[1:])).min() > 0  # convex

    def test_full_is_out_unless_all_are(self, stub, ask):
        router = r.KVBarrier(router=Fixed({"w0": 0.0, "w1": 1.0}))
        view = stub(context_tokens=[15_990, 15_000]).view
        assert set(picks(router, ask(), view, 5)) == {"w1"}
        view = stub(context_tokens=[15_990, 15_990]).view
        assert set(picks(router, ask(), view, 5)) == {"w0"}

    def test_the_engine_knows_of_what_others_sent_it(self, stub, ask):
        router = r.KVBarrier(router=Fixed({"w0": 0.0, "w1": 0.1}))
        view = stub(context_tokens=[0, 0], reported_kv_usage=[0.95, np.nan]).view
        assert set(picks(router, ask(), view, 5)) == {"w1"}


def test_surcharge_by_zone(stub, ask):
    router = r.Surcharge.by_zone(
        {"w0": "far", "w1": "near"},
        {"near": 0.0, "far": 2.0},
        router=Fixed({"w0": 0.0, "w1": 1.0, "w2": 0.5}),
    )
    view = stub(GPU=[0, 0, 0]).view
    assert router.cost(ask(), view).tolist() == [2.0, 1.0, 2.5]
    part = view.only(np.array([True, False, True]))
    assert router.cost(ask(), part).tolist() == [2.0, 2.5]
    assert "distance" in str(router.route(ask(), view).explain())


class TestStale:
    def test_silence_costs_unless_all_are_silent(self, stub, ask):
        router = r.Stale(router=Fixed({"w0": 0.0, "w1": 0.5}), after=10.0)
        view = stub(now=100.0, reported_at=[80.0, 99.0]).view
        assert set(picks(router, ask(), view, 5)) == {"w1"}
        view = stub(now=100.0, reported_at=[80.0, 50.0]).view
        assert set(picks(router, ask(), view, 5)) == {"w0"}
        view = stub(now=100.0, reported_at=[np.nan, 99.0]).view
        assert set(picks(router, ask(), view, 5)) == {"w0"}


def test_a_mixed_fleet_is_priced_by_each_machine(stub, ask):
    slow = attrs.evolve(Machine(), name="slow", prefill_s_per_token=1e-3)
    router = llmd.EarliestFirstToken(machines={"slow": slow})
    cluster = llmd.Cluster(router)
    for id, machine in (("a", "slow"), ("b", ""), ("c", "other"), ("d", "slow")):
        cluster.handle(e.WorkerJoined(0.0, llmd.Worker(id=id, machine=machine)))
    request = ask(4000)
    costs = router.cost(request, cluster.view)
    alone = {
        name: llmd.EarliestFirstToken(machine).cost(request, cluster.view)[0]
        for name, machine in (("slow", slow), ("fast", Machine()))
    }
    want = [alone["slow"], alone["fast"], alone["fast"], alone["slow"]]
    assert costs == pytest.approx(want)
    part = cluster.view.only(np.array([True, False, False, True]))
    assert router.cost(request, part) == pytest.approx([alone["slow"]] * 2)
    assert router.route(request, cluster.view).decode in {"b", "c"}


class TestCircuitBreaker:
    def serve(self, breaker, workers=2):
        cluster = llmd.Cluster(breaker, max_attempts=5)
        for number in range(workers):
            cluster.handle(e.WorkerJoined(0.0, llmd.Worker(id=f"w{number}")))
        return cluster

    def send(self, cluster, id, at):
        request = llmd.Request(id=id, prompt=[1, 2, 3])
        return self.where(cluster.handle(e.RequestArrived(at, request)))

    @staticmethod
    def where(commands):
        (sent,) = [x for x in commands if isinstance(x, c.Dispatch)]
        return sent.decision.decode

    def breaker(self):
        return r.CircuitBreaker(
            router=Fixed({"w0": 0.0, "w1": 1.0}), failures=2, rest=10.0
        )

    def test_a_retry_goes_elsewhere(self):
        cluster = self.serve(self.breaker())
        assert self.send(cluster, "r", 1.0) == "w0"
        commands = cluster.handle(e.RequestEnded(2.0, "w0", "r", "broke"))
        assert self.where(commands) == "w1"

    def test_opens_tries_once_and_closes(self):
        cluster = self.serve(self.breaker())
        for number in range(2):
            assert self.send(cluster, f"r{number}", 2.0) == "w0"
            cluster.handle(e.RequestEnded(2.0, "w0", f"r{number}", "broke"))
        assert self.send(cluster, "open", 5.0) == "w1"
        assert self.send(cluster, "trial", 12.0) == "w0"
        assert self.send(cluster, "beside", 12.0) == "w1"
        cluster.handle(e.RequestEnded(13.0, "w0", "trial"))
        assert self.send(cluster, "closed", 13.0) == "w0"

    def test_a_failed_trial_opens_again(self):
        cluster = self.serve(self.breaker())
        for number in range(2):
            self.send(cluster, f"r{number}", 2.0)
            cluster.handle(e.RequestEnded(2.0, "w0", f"r{number}", "broke"))
        assert self.send(cluster, "trial", 12.0) == "w0"
        cluster.handle(e.RequestEnded(13.0, "w0", "trial", "broke"))
        assert self.send(cluster, "open", 14.0) == "w1"
        assert self.send(cluster, "again", 23.0) == "w0"

    def test_with_every_circuit_open_requests_still_go_somewhere(self):
        cluster = self.serve(self.breaker())
        for number in range(4):
            worker = self.send(cluster, f"r{number}", 1.0)
            cluster.handle(e.RequestEnded(1.0, worker, f"r{number}", "broke"))
        assert self.send(cluster, "r", 2.0) in {"w0", "w1"}

    def test_a_good_end_resets_the_count(self):
        cluster = self.serve(self.breaker())
        for number, error in enumerate(["broke", None, "broke", None, "broke"]):
            assert self.send(cluster, f"r{number}", 1.0) == "w0"
            cluster.handle(e.RequestEnded(1.0, "w0", f"r{number}", error))


class TestShadow:
    def test_is_never_obeyed_and_kept_account_of(self, stub, ask):
        shadow = r.Shadow(
            router=Fixed({"w0": 0.0, "w1": 1.0}),
            others={
                "same": Fixed({"w0": 0.0, "w1": 9.0}),
                "other": Fixed({"w0": 3.0, "w1": 1.0}),
                "broken": Fixed({}),
            },
        )
        assert set(picks(shadow, ask(), stub(GPU=[0, 0]).view, 10)) == {"w0"}
        same, other, broken = (
            shadow.agreement[name] for name in ("same", "other", "broken")
        )
        assert (same.rate, same.mean_regret) == (1.0, 0.0)
        assert (other.rate, other.mean_regret) == (0.0, 2.0)
        assert broken.failed == 10
        assert "KeyError" in broken.last_error

    def test_the_router_decides_as_it_would_alone(self):
        def run(router):
            cluster = llmd.Cluster(router, seed=5)
            for number in range(5):
                cluster.handle(e.WorkerJoined(0.0, llmd.Worker(id=f"w{number}")))
            sent = []
            for number in range(50):
                request = llmd.Request(id=f"r{number}", prompt=range(number, 200))
                sent += cluster.handle(e.RequestArrived(1.0 + number, request))
            return [command.decision.decode for command in sent]

        alone = run(llmd.PowerOfTwo())
        shadowed = r.Shadow(router=llmd.PowerOfTwo(), others={"random": llmd.Random()})
        assert run(shadowed) == alone
        assert 0.0 < shadowed.agreement["random"].rate < 1.0


def test_hot_swap_keeps_all_that_is_in_flight():
    cluster = llmd.Cluster(
        Fixed({"w0": 0.0, "w1": 1.0}), balancer=llmd.Fcfs(max_running=4)
    )
    for number in range(2):
        cluster.handle(e.WorkerJoined(0.0, llmd.Worker(id=f"w{number}")))
    requests = [
        llmd.Request(id=f"r{number}", prompt=range(100)) for number in range(10)
    ]
    for request in requests:
        cluster.handle(e.RequestArrived(1.0, request))
    running = {request.id: cluster.runs(request.id) for request in requests}
    waiting = [request.id for request in cluster.view.waiting]
    books = cluster.view.workers.context_tokens.tolist()
    assert len(waiting) == 2
    cluster.router = Fixed({"w0": 1.0, "w1": 0.0})
    assert {request.id: cluster.runs(request.id) for request in requests} == running
    assert [request.id for request in cluster.view.waiting] == waiting
    assert cluster.view.workers.context_tokens.tolist() == books
    for id in ("r0", "r1"):
        where = running[id].decode
        cluster.handle(e.FirstToken(2.0, where, id, 0))
        cluster.handle(e.RequestEnded(2.0, where, id))
    assert not len(cluster.view.waiting)
    for request in requests[2:]:
        where = cluster.runs(request.id).decode
        cluster.handle(e.RequestEnded(3.0, where, request.id))
    assert cluster.view.workers.context_tokens.tolist() == [0, 0]


def test_a_router_that_raises_on_an_end_blames_no_request():
    class Sulky(llmd.LeastLoaded):
        def ended(self, request, worker, error, view):
            raise RuntimeError("no")

    cluster = llmd.Cluster(Sulky())
    cluster.handle(e.WorkerJoined(0.0, llmd.Worker(id="a")))
    cluster.handle(e.RequestArrived(0.0, llmd.Request(id="r", prompt=[1])))
    assert cluster.handle(e.RequestEnded(1.0, "a", "r")) == []
    assert "no" in str(cluster.waiting.faults[-1])


class Twice(llmd.LeastLoaded):
    def cost(self, request, view):
        return 2.0 * super().cost(request, view)


class TwiceAround(r.Around):
    def cost(self, request, view):
        return 2.0 * self.router.cost(request, view)


class OnlyPrice(r.Around):
    def price(self, request, view):
        costs, terms = super().price(request, view)
        return costs + 1.0, terms


@pytest.mark.parametrize(
    ("router", "wanted"),
    [
        (Twice(), lambda plain: 2.0 * plain),
        (TwiceAround(router=llmd.LeastLoaded()), lambda plain: 2.0 * plain),
        (OnlyPrice(router=llmd.LeastLoaded()), lambda plain: plain + 1.0),
    ],
)
def test_what_a_subclass_says_of_cost_or_price_is_what_it_routes_by(router, wanted):
    cluster = llmd.Cluster()
    for at, id in enumerate("ab"):
        cluster.handle(llmd.events.WorkerJoined(float(at), llmd.Worker(id=id)))
    cluster.handle(
        llmd.events.RequestArrived(2.0, llmd.Request(id="r", prompt=[1, 2, 3]))
    )
    request = llmd.Request(id="q", prompt=[4, 5, 6])
    plain = llmd.LeastLoaded().cost(request, cluster.view)
    assert plain.any()
    decision = router.route(request, cluster.view)
    assert decision.costs.tolist() == wanted(plain).tolist()
    assert router.cost(request, cluster.view).tolist() == wanted(plain).tolist()
