"""Engines that share a GPU and sleep: what waits for them, and where."""

import asyncio

import attrs
import pytest
from tests.live.conftest import ScriptedEngine

import llmd
from llmd.autoscaler import Crowded, Largest, TargetConcurrency
from llmd.live import Server, SharedGpu
from llmd.timeslice import GpuArbiter, Infeasible, QuantumScheduler, Sharer


@attrs.define(eq=False)
class SleepyEngine(ScriptedEngine):
    """Answers only while it is awake and not paused, and notes what it was told."""

    gate: asyncio.Event = attrs.field(factory=asyncio.Event)
    told: list = attrs.field(factory=list)
    wake_s: float = 0.0

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
