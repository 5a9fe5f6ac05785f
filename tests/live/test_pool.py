"""A pool starts and stops engines as the autoscaler says, and loses nothing."""

import asyncio
import itertools
import math

import pytest

import llmd
from llmd import commands as c
from llmd.autoscaler import Rules, TargetConcurrency
from llmd.balancer import FlowControl, SlowStart
from llmd.errors import InvalidPolicy
from llmd.live import EnginePool, Server
from llmd.types import State


class Watch:
    """Notes how many workers were there, and who got traffic before ready."""

    def __init__(self):
        self.ready, self.early, self.scales = set(), [], []

    def __call__(self, item):
        match item:
            case llmd.events.WorkerChanged(worker=worker, facts=llmd.Worker()):
                self.ready.add(worker)
            case llmd.events.WorkerChanged(worker=worker, state=State.DRAINING):
                self.ready.discard(worker)
            case c.Dispatch(decision=decision) if decision.decode not in self.ready:
                self.early.append(decision.decode)
            case c.Scale(workers=workers):
                self.scales.append(workers)


def make_server(policy, watch=None):
    balancer = llmd.Fcfs(max_running=5)
    cluster = llmd.Cluster(autoscaler=policy, balancer=balancer, observer=watch)
    return Server(cluster, tick=0.02)


def follow(low=1, patience=0.3):
    return TargetConcurrency(
        requests_per_worker=5, min_workers=low, max_workers=4, patience=patience
    )


async def ask(server, id):
    request = llmd.Request(id=id, prompt=[7, 8, 9], max_new_tokens=20)
    return sum([len(o.token_ids) async for o in server.generate(request)])


async def until(true, seconds=10.0):
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_burst_is_served_by_more_engines_and_then_by_fewer(make_engine):
    watch, made = Watch(), []

    def make():
        made.append(make_engine(pace=0.02))
        return made[-1]

    async with (
        make_server(follow(), watch) as server,
        EnginePool(server, make) as pool,
    ):
        await until(lambda: watch.ready)
        answers = await asyncio.gather(*(ask(server, f"r{i}") for i in range(20)))
        assert answers == [20] * 20
        assert max(watch.scales) == 4
        await until(lambda: len(pool.workers) == 1 and len(server.engines) == 1)
        assert sum(engine.started for engine in made) == 1
    assert watch.early == []
    assert not any(engine.started for engine in made)
    moves = [after > before for before, after in itertools.pairwise(watch.scales)]
    assert moves == sorted(moves, reverse=True)


async def test_requests_at_zero_wait_and_wake_the_fleet(make_engine):
    watch = Watch()
    policy = follow(low=0, patience=0.1)
    policy.up = Rules(window=600.0)
    async with (
        make_server(policy, watch) as server,
        EnginePool(server, make_engine, models=("m",)) as pool,
    ):
        request = llmd.Request(id="a", prompt=[1], max_new_tokens=3, model="m")
        assert [o async for o in server.generate(request)]
        await until(lambda: not server.engines and not pool.workers)
        assert await ask(server, "b") == 20


async def test_a_start_that_fails_is_tried_again_after_a_pause(make_engine):
    faults = ["start", "start", ""]

    def make():
        return make_engine(fault=faults.pop(0) if faults else "")

    watch = Watch()
    async with (
        make_server(follow(), watch) as server,
        EnginePool(server, make, pause=0.02) as pool,
    ):
        assert await ask(server, "a") == 20
        assert len(pool.failures) == server.counts["engine_failures"] == 2
        assert "no such model" in pool.failures[0]
        assert watch.scales == [1]


async def test_a_broken_factory_is_reported_not_spun(make_engine):
    calls = []

    def make():
        calls.append(1)
        raise RuntimeError("no GPU left")

    async with make_server(follow()) as server, EnginePool(server, make) as pool:
        await until(lambda: pool.failures)
        await asyncio.sleep(0.2)
        assert len(calls) == 1
        assert "no GPU left" in pool.failures[0]


async def test_an_engine_that_dies_is_replaced(make_engine):
    made = []

    def make():
        made.append(make_engine())
        return made[-1]

    async with (
        make_server(follow()) as server,
        EnginePool(server, make, pause=0.01) as pool,
    ):
        await until(lambda: server.cluster.view.workers.ready().any())
        made[0].die()
        await until(lambda: len(made) == 2 and made[1].started)
        assert await ask(server, "a") == 20
        assert "was lost" in pool.failures[-1]


async def test_those_that_start_are_the_first_to_go(make_engine):
    async with (
        make_server(None) as server,
        EnginePool(server, lambda: make_engine(pace=0.05)) as pool,
    ):
        pool.want(1)
        await until(lambda: server.cluster.view.workers.ready().any())
        [first] = pool.workers
        pool.want(3)
        await until(lambda: len(pool.workers) == 3)
        pool.want(1)
        await until(lambda: len(server.engines) == 1)
        assert pool.workers == (first,)
        with pytest.raises(InvalidPolicy):
            pool.want(-1)


async def test_each_pool_minds_its_own(make_engine):
    async with (
        make_server(None) as server,
        EnginePool(server, make_engine, name="prefill") as one,
        EnginePool(server, make_engine, name="decode") as two,
    ):
        server.scale(c.Scale(2, "prefill"))
        server.scale(c.Scale(1, "decode"))
        server.scale(c.Scale(9, "nobody"))
        assert (one.wanted, two.wanted) == (2, 1)
        await until(lambda: server.cluster.view.workers.ready().sum() == 3)


async def test_a_young_worker_takes_few_at_first(make_room):
    room = make_room
    slow = SlowStart(ramp=10.0, first=2)
    balancer = FlowControl(llmd.Fcfs(max_running=10), rooms=[slow])
    assert room(balancer, at=0.0, running=1).tolist() == [True]
    assert room(balancer, at=0.0, running=2).tolist() == [False]
    assert room(balancer, at=5.0, running=60).tolist() == [False]
    assert room(balancer, at=10.0, running=9).tolist() == [True]
    assert room(balancer, at=10.0, running=10).tolist() == [False]


@pytest.fixture
def make_room():
    cluster = llmd.Cluster(balancer=llmd.Fcfs(max_running=1000))
    cluster.handle(llmd.events.WorkerJoined(0.0, llmd.Worker(id="w")))
    made = []

    def room(balancer, at, running):
        while len(made) < running:
            request = llmd.Request(id=f"r{len(made)}", prompt=[1])
            cluster.handle(llmd.events.RequestArrived(at, request))
            made.append(request)
        while len(made) > running:
            gone = llmd.events.RequestCancelled(at, made.pop().id)
            cluster.handle(gone)
        cluster.view.advance(at)
        return balancer.room(llmd.Request(id="x", prompt=[1]), cluster.view)

    return room


async def test_engines_that_die_again_and_again_are_tried_ever_later(make_engine):
    class Dying(type(make_engine())):
        async def start(self, worker, report, progress):
            facts = await super().start(worker, report, progress)
            asyncio.get_running_loop().call_later(0.01, self.die)
            return facts

    async with make_server(follow()) as server:
        starts = []

        def make():
            starts.append(server.clock())
            return Dying()

        async with EnginePool(server, make, pause=0.05):
            server.scale(c.Scale(1))
            async with asyncio.timeout(20.0):
                while len(starts) < 5:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert gaps[3] > 2 * gaps[0]


@pytest.mark.parametrize("stops", [True, False])
async def test_an_engine_that_hangs_in_its_start_is_given_up_and_tried_again(
    make_engine, monkeypatch, stops
):
    monkeypatch.setattr("llmd.live.server._ERRAND_S", 0.05)

    class Hung(type(make_engine())):
        async def start(self, worker, report, progress):
            await asyncio.Event().wait()

        async def stop(self):
            if not stops:
                await asyncio.Event().wait()

    made = [Hung(), make_engine()]
    async with Server(llmd.Cluster()) as server:
        pool = EnginePool(server, lambda: made.pop(0), start_timeout=0.05, pause=0.01)
        async with pool:
            pool.want(1)
            async with asyncio.timeout(10):
                while not server.cluster.view.workers.ready().any():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert "not within 0.05 s" in pool.failures[0]
            assert server.counts["engine_failures"] == 1
            assert len(server.engines) == 1


async def test_two_pools_of_one_name_are_refused_and_a_name_nobody_has_is_told_of(
    make_engine, caplog
):
    async with (
        Server(llmd.Cluster()) as server,
        EnginePool(server, make_engine, name="a") as first,
    ):
        async with EnginePool(server, make_engine, name="b"):
            with pytest.raises(InvalidPolicy, match="two pools called 'a'"):
                async with EnginePool(server, make_engine, name="a"):
                    pass
        for _ in range(3):
            server.scale(c.Scale(2, "typo"))
        said = "nobody starts the 2 engines of the pool 'typo'"
        assert caplog.text.count(said) == 1
        assert server.counts["unheard_scales"] == 3
        assert first.wanted == 0


async def test_a_pool_that_comes_late_has_what_was_asked_for(make_engine, caplog):
    async with make_server(follow()) as server:
        await until(lambda: server.counts["unheard_scales"])
        assert "nobody starts the 1 engines of the pool ''" in caplog.text
        async with EnginePool(server, make_engine):
            assert await ask(server, "a") == 20


@pytest.mark.parametrize("name", ["start_timeout", "drain_timeout", "pause"])
@pytest.mark.parametrize("value", [-1.0, math.nan, "5", None])
def test_seconds_of_a_pool_are_numbers(make_engine, name, value):
    with pytest.raises(InvalidPolicy, match=f"EnginePool.{name}"):
        EnginePool(Server(), make_engine, **{name: value})
