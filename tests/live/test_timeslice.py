"""Engines that share a GPU and sleep: what waits for them, and where."""

import asyncio

import attrs
import pytest
from tests.live.conftest import ScriptedEngine

import llmd
from llmd.autoscaler import Crowded, Largest, TargetConcurrency
from llmd.errors import EngineError, InvalidSlice, UnknownModel, WorkerLost
from llmd.live import EnginePool, Server, SharedGpu
from llmd.timeslice import FifoLock, GpuArbiter, Infeasible, QuantumScheduler, Sharer


@attrs.define(eq=False)
class SleepyEngine(ScriptedEngine):
    """Answers only while it is awake and not paused, and notes what it was told."""

    gate: asyncio.Event = attrs.field(factory=asyncio.Event)
    told: list = attrs.field(factory=list)
    wake_s: float = 0.0
    broken: bool = False

    async def start(self, worker, report, progress):
        self.gate.set()
        return await super().start(worker, report, progress)

    async def generate(self, call):
        async for output in super().generate(call):
            await self.gate.wait()
            yield output

    async def pause(self):
        self.gate.clear()

    async def resume(self):
        self.gate.set()

    async def sleep(self):
        self.told.append("sleep")

    async def wake(self):
        await asyncio.sleep(self.wake_s)
        if self.broken:
            raise EngineError("no memory to map")
        self.told.append("wake")


@pytest.fixture
async def shared():
    """Two models on a GPU with room for one."""
    arbiter = GpuArbiter(QuantumScheduler(quantum_s=0.05), memory_bytes=100.0)
    async with SharedGpu(arbiter) as gpu, Server() as server:
        engines = {}
        for name in "ab":
            engine = engines[name] = SleepyEngine(models=(name,))
            sharer = Sharer(engine=name, awake_bytes=60.0, asleep_bytes=5.0)
            one = gpu.share(engine, sharer, starts_asleep=True)
            await server.add(one, name)
        gpu.follow(server.cluster)
        yield gpu, server, engines


def states(server):
    workers = server.cluster.view.workers
    return dict(zip(workers.ids, workers.states, strict=True))


async def answer(server, id, model, **more):
    request = llmd.Request(id=id, prompt=[7, 8], model=model, **more)
    return [t async for o in server.generate(request) for t in o.token_ids]


async def test_who_sleeps_is_shown_asleep_and_gets_nothing(shared):
    _, server, engines = shared
    assert states(server) == dict.fromkeys("ab", llmd.State.SLEEPING)
    waiting = asyncio.create_task(answer(server, "r", "a", max_new_tokens=3))
    await asyncio.sleep(0)
    assert server.cluster.waits("r")
    assert not engines["a"].calls
    async with asyncio.timeout(5.0):
        assert await waiting == [7] * 3
    assert states(server)["a"] is llmd.State.READY


async def test_both_are_served_in_turns(shared):
    gpu, server, engines = shared
    asked = [(f"{name}{n}", name) for n in range(10) for name in "ab"]
    async with asyncio.timeout(20.0):
        answers = await asyncio.gather(
            *(answer(server, id, name, max_new_tokens=20) for id, name in asked)
        )
    assert answers == [[7] * 20] * 20
    for engine in engines.values():
        assert "wake" in engine.told
    assert not server.cluster.view.workers.running_requests.any()
    assert not any(one._wanting for one in gpu._engines.values())


async def test_who_leaves_while_it_waits_is_no_demand(shared):
    gpu, server, engines = shared
    engines["a"].wake_s = 0.5
    waiting = asyncio.create_task(answer(server, "r", "a"))
    await asyncio.sleep(0.01)
    assert gpu._engines["a"]._wanting
    assert not gpu._engines["b"]._wanting
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not gpu._engines["a"]._wanting
    assert not server.cluster.waits("r")


async def test_what_only_a_lost_engine_served_fails_clearly(shared):
    gpu, server, engines = shared
    engines["a"].broken = True
    async with asyncio.timeout(5.0):
        asked = [answer(server, f"a{n}", "a") for n in range(3)]
        failures = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(one) for one in failures] == [WorkerLost] * 3
        assert "'a', the last worker for 'a0', was lost" in str(failures[0])
        with pytest.raises(UnknownModel):
            await answer(server, "late", "a")
        assert await answer(server, "other", "b") == [7] * 5
    assert gpu.counts == {"engines_lost": 1}
    assert not len(server.cluster.waiting)


async def test_what_runs_on_an_engine_that_is_lost_fails_clearly(shared):
    _, server, engines = shared
    running = asyncio.create_task(answer(server, "r", "a", max_new_tokens=900))
    while not engines["a"].calls:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    engines["a"].broken = True
    # It sleeps for the other's turn, and cannot wake for its own.
    async with asyncio.timeout(5.0):
        assert await answer(server, "other", "b") == [7] * 5
        with pytest.raises(WorkerLost):
            await running


async def test_another_engine_of_the_model_takes_over(shared):
    _, server, engines = shared
    engines["a"].broken, engines["a"].wake_s = True, 0.1
    waiting = asyncio.create_task(answer(server, "r", "a"))
    await asyncio.sleep(0.01)
    async with asyncio.timeout(5.0):
        await server.add(ScriptedEngine(models=("a",)), "spare")
        assert await waiting == [7] * 5


@pytest.mark.parametrize("hope", ["model added", "autoscaler", "pool", "told so"])
async def test_what_another_engine_may_serve_waits_for_it(shared, hope):
    gpu, server, engines = shared
    pool = EnginePool(server, lambda: ScriptedEngine(models=("a",)), pause=0.01)
    match hope:
        case "model added":
            server.add_model("a")
        case "autoscaler":
            server.cluster.autoscaler = TargetConcurrency(requests_per_worker=8)
        case "pool":
            await pool.__aenter__()
        case "told so":
            gpu.replaced = True
    engines["a"].broken = True
    waiting = asyncio.create_task(answer(server, "r", "a"))
    while not gpu.counts["engines_lost"]:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert server.cluster.waits("r")
    if hope == "pool":
        pool.want(1)
    else:
        await server.add(ScriptedEngine(models=("a",)))
    async with asyncio.timeout(5.0):
        assert await waiting == [7] * 5
    await pool.__aexit__(None, None, None)


async def test_a_hook_that_fails_costs_no_engine():
    def fails(what):
        raise KeyError("oops")

    policy = QuantumScheduler(overhead=0.1, max_wait_s=0.001)
    gpu = SharedGpu(GpuArbiter(policy, timeout_s=0.5), complain=fails)
    async with gpu, Server() as server:
        for name in "ab":
            one = gpu.share(SleepyEngine(models=(name,)), Sharer(engine=name))
            await server.add(one, name)
        async with asyncio.timeout(10.0):
            answers = await asyncio.gather(
                *(answer(server, name, name, max_new_tokens=20) for name in "ab")
            )
        assert answers == [[7] * 20] * 2
        assert set(gpu.counts) == {"hook_errors"}


@pytest.mark.parametrize("said", [None, "a"])
async def test_a_policy_that_forgets_to_return_is_counted_and_asked_again(said, caplog):
    class Forgetful(FifoLock):
        forgets = True

        def next(self, view):
            turn = super().next(view)
            return said if self.forgets else turn

    policy = Forgetful()
    async with SharedGpu(GpuArbiter(policy)) as gpu, Server() as server:
        one = gpu.share(SleepyEngine(models=("a",)), Sharer(engine="a"))
        await server.add(one, "a")
        waiting = asyncio.create_task(answer(server, "r", "a"))
        await asyncio.sleep(0.05)
        assert gpu.counts["policy_errors"]
        assert f"Forgetful.next answered {said!r} to" in caplog.text
        policy.forgets = False
        async with asyncio.timeout(5.0):
            assert await waiting == [7] * 5


async def test_an_engine_without_room_does_not_start():
    async with SharedGpu(GpuArbiter(FifoLock(), memory_bytes=50.0)) as gpu:
        engine = SleepyEngine(models=("a",))
        one = gpu.share(engine, Sharer(engine="a", awake_bytes=60.0))
        async with Server() as server:
            with pytest.raises(EngineError, match="no room"):
                await server.add(one)
            assert not server.engines
        assert not engine.started
        gpu.share(engine, Sharer(engine="a"))
        with pytest.raises(InvalidSlice, match="shares this GPU"):
            gpu.share(engine, Sharer(engine="a"))


def test_a_crowded_gpu_calls_for_workers():
    crowded = Crowded()
    policy = Largest(
        policies=(TargetConcurrency(requests_per_worker=8), crowded),
        min_workers=1,
        max_workers=9,
    )
    cluster = llmd.Cluster(autoscaler=policy)
    for id in "abc":
        cluster.handle(llmd.events.WorkerJoined(0.0, llmd.Worker(id=id)))
    crowded.hear(Infeasible(reason="3 of 1 s each", engines=3, engines_that_fit=2))
    [scale] = cluster.handle(llmd.events.Tick(1.0))
    assert scale.workers == 4
    cluster.handle(llmd.events.WorkerJoined(2.0, llmd.Worker(id="d")))
    assert cluster.handle(llmd.events.Tick(3.0)) == []
    crowded.hear(None)
    commands = [cluster.handle(llmd.events.Tick(400.0 * k)) for k in (1, 2)]
    assert [c.workers for [*made] in commands for c in made] == [1]
