"""A probe of real engines, and a fleet that the simulator makes of it."""

import asyncio
import os
import signal
from collections import Counter

import attrs
import pytest
from tests.vllm.conftest import OPTIONS

import llmd
from llmd.adapters.vllm.engine import VllmEngine
from llmd.adapters.vllm.probe import Asked, calibrate
from llmd.adapters.vllm.probe_sizes import Sizes
from llmd.adapters.vllm.prober import Prober
from llmd.errors import EngineError
from llmd.live import Server
from llmd.sim import Calibration, simulate, workloads

NAMES = ("a", "b")


@pytest.fixture(scope="module")
async def server(models):
    async with Server(llmd.Cluster(router=llmd.RoundRobin())) as server:
        for name in NAMES:
            engine = VllmEngine(models[0], names=["tiny"], options=OPTIONS)
            await server.add(engine, name)
        yield server


async def test_a_fleet_is_simulated_as_it_was_probed(server, tmp_path):
    found = await calibrate(server)
    assert isinstance(server.cluster.router, llmd.RoundRobin)
    assert [worker.machine for worker in found.workers] == [*NAMES]
    assert found.step_tokens > 0
    # Of the tiny model, not of the default.
    machine = found.machines["a"]
    assert 0 < machine.kv_bytes_per_token < 10_000
    assert 0 < machine.weights_bytes < 10e6
    for probed in found.engines:
        kinds = {
            (bool(s.prefill_tokens), bool(s.decode_requests)) for s in probed.steps
        }
        assert kinds == {(True, False), (False, True), (True, True)}
        assert all(seconds > 0 for _, seconds in probed.rests)
    found.save(tmp_path / "tiny.json")
    again = Calibration.load(tmp_path / "tiny.json")
    assert again == found
    assert again.machines == found.machines
    load = workloads.batch(requests=40, rate=5.0, prompt_tokens=100, answer_tokens=20)
    report = simulate(
        llmd.LeastDelay(machines=found.machines),
        load,
        workers=found.workers,
        machines=found.machines,
        settings=found.settings,
    )
    assert report.completed == 40
    # Whatever it asked for is gone from caches, and from the index.
    assert (
        server.cluster.view.cached_tokens(llmd.Request(id="x", prompt=range(100))).sum()
        == 0
    )


async def test_a_host_beside_a_gpu_is_looked_at_three_times(server):
    """As engines on a GPU are probed: what launches take, and late first tokens."""
    config = server.engines["a"]._llm.vllm_config
    sizes = attrs.evolve(Sizes.of(config), shared=False, rest_s=0.0, answer=30)
    prober, router = Prober(server, "a", sizes, ahead=True), server.cluster.router
    server.cluster.router = Asked()
    try:
        async with asyncio.timeout(240):
            await prober.run()
    finally:
        server.cluster.router = router
    batches = sizes.beside[1:]
    assert [requests for requests, _ in prober.launches] == [*batches]
    assert all(seconds > 0 for _, seconds in prober.launches)
    launched = [s for s in prober.steps if s.prefill_tokens == min(sizes.prompts)]
    assert len(launched) >= 2 * len(batches)
    assert Counter(requests for requests, _ in prober.late) == dict.fromkeys(batches, 6)


async def test_an_engine_that_is_busy_is_not_probed(server):
    asked = llmd.Request(id="long", prompt=range(20, 60), max_new_tokens=400)
    answer = server.generate(asked, {"ignore_eos": True})
    async with asyncio.timeout(60):
        await anext(answer)
        with pytest.raises(EngineError, match="idle"):
            await calibrate(server)
        async for _ in answer:
            pass


async def test_a_probe_that_takes_too_long_ends(server):
    with pytest.raises(EngineError, match=r"more than 0\.7 s"):
        await calibrate(server, timeout_s=0.7)
    assert isinstance(server.cluster.router, llmd.RoundRobin)
    async with asyncio.timeout(30):
        while server.cluster.view.workers.loads.any():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_an_engine_that_dies_ends_the_probe(server):
    core = server.engines["b"]._cores[0].pid

    async def kill():
        await asyncio.sleep(1.5)
        os.kill(core, signal.SIGKILL)

    killing = asyncio.create_task(kill())
    with pytest.raises(EngineError):
        await calibrate(server)
    await killing
    assert isinstance(server.cluster.router, llmd.RoundRobin)


async def test_there_has_to_be_an_engine():
    async with Server(llmd.Cluster()) as server:
        with pytest.raises(EngineError, match="no engine"):
            await calibrate(server)
