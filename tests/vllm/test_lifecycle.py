"""Two models side by side; then one engine is killed, and both are stopped."""

import asyncio
import gc
import json
import multiprocessing
import os
import signal
import weakref
from pathlib import Path

import attrs
import numpy as np
import psutil
import pytest
from tests.vllm.conftest import (
    BLOCK_TOKENS,
    GREEDY,
    OPTIONS,
    Running,
    prompt,
    request,
    running,
    tokens_of,
)

from llmd.adapters.vllm import launch
from llmd.adapters.vllm.engine import VllmEngine
from llmd.errors import EngineError, WorkerLost
from llmd.events import BlocksRemoved, BlocksStored
from llmd.live.engine import Call


def cores():
    """Return the child processes that are not Python's own resource tracker."""
    children = psutil.Process().children(recursive=True)
    return [c.pid for c in children if "resource_tracker" not in str(c.cmdline())]


@pytest.fixture(scope="module")
async def small(models):
    """An engine of 40 blocks, which evicts."""
    options = {**OPTIONS, "num_gpu_blocks_override": 40, "max_model_len": 512}
    engine = VllmEngine(models[0], names=["small"], options=options)
    async with running(engine, "small") as started:
        yield started


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Make a LoRA adapter whose part outweighs the model's; return where it is."""
    import torch
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("lora")
    random = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        for part, shape in (("lora_A", (8, 128)), ("lora_B", (128, 8))):
            weights[f"{name}.{part}.weight"] = torch.randn(shape, generator=random)
    save_file(weights, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 64,
        "target_modules": ["o_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module")
async def other(models, adapter):
    engine = VllmEngine(
        models[1], names=["other"], options=OPTIONS, loras={"style": adapter}
    )
    async with running(engine, "other") as started:
        yield started


async def test_two_models_answer_each_for_itself(small, other):
    asked = request("both", prompt(40))
    first, second = await asyncio.gather(small.answer(asked), other.answer(asked))
    assert len(tokens_of(first)) == len(tokens_of(second)) == 8
    assert tokens_of(first) != tokens_of(second)
    assert small.worker.models == {"small"}
    assert other.worker.models == {"other"}


@pytest.mark.parametrize("salt", ["", "tenant-a"])
async def test_an_adapter_answers_and_names_for_itself(other, salt):
    tokens = prompt(3 * BLOCK_TOKENS + 4, salt=9)
    plain = request(f"plain{salt}", tokens, salt=salt)
    styled = request(f"styled{salt}", tokens, salt=salt, lora="style")
    first, second = await asyncio.gather(other.answer(plain), other.answer(styled))
    assert tokens_of(first) != tokens_of(second)
    assert second[0].cached_tokens == 0
    # vLLM's CPU kernels gave both the adapter when they shared a batch.
    for asked, answered in ((plain, first), (styled, second)):
        alone = attrs.evolve(asked, id=f"{asked.id}-alone")
        assert tokens_of(await other.answer(alone)) == tokens_of(answered)
    for asked in (plain, styled):
        names = set(asked.hashes(BLOCK_TOKENS).tolist())
        await other.told(lambda r, names=names: names <= held_names(r))


async def test_an_engine_computes_with_one_thread(small):
    """Engines with a thread for every core spin against each other."""
    for turn in range(4):
        await small.answer(request(f"t{turn}", prompt(400, salt=turn)))
    ticks = {}
    for thread in psutil.Process(small.engine._cores[0].pid).threads():
        ticks[thread.id] = thread.user_time
    first, *others = sorted(ticks.values(), reverse=True)
    assert sum(others) < 0.2 * first


async def test_removals_leave_exactly_what_the_engine_still_finds(small):
    prompts = [prompt(12 * BLOCK_TOKENS + 1, salt=k) for k in range(8)]
    for k, tokens in enumerate(prompts):
        await small.answer(request(f"fill{k}", tokens, max_new_tokens=1))
    await small.told(lambda r: any(isinstance(x, BlocksRemoved) for x in r))
    await asyncio.sleep(0.5)
    held = held_names(small.reports)
    assert 0 < len(held) < 40
    found = 0
    for k in reversed(range(8)):
        # Newest first, one token: what is found is not evicted by asking.
        hashes = request("x", prompts[k]).hashes(BLOCK_TOKENS).tolist()
        blocks = 0
        while blocks < 12 and hashes[blocks] in held:
            blocks += 1
        if blocks == 0:
            continue
        (piece,) = await small.answer(
            request(
                f"ask{k}", prompts[k][: blocks * BLOCK_TOKENS + 1], max_new_tokens=1
            )
        )
        assert piece.cached_tokens == blocks * BLOCK_TOKENS
        found += blocks
    assert found > 12
    assert hashes[0] not in held, "the oldest prompt is gone"
    (piece,) = await small.answer(request("gone", prompts[0], max_new_tokens=1))
    assert piece.cached_tokens == 0


def held_names(reports):
    held = set()
    for report in reports:
        if isinstance(report, BlocksStored):
            held.update(report.hashes.tolist())
        elif isinstance(report, BlocksRemoved):
            held.difference_update(report.hashes.tolist())
    return held


async def test_equal_blocks_are_held_until_the_last_copy_goes(small):
    # A prompt of whole blocks is computed again from its last one on, which
    # then exists twice.
    tokens = prompt(4 * BLOCK_TOKENS, salt=50)
    name = int(request("x", tokens).hashes(BLOCK_TOKENS)[-1])
    for k in range(3):
        await small.answer(request(f"twice{k}", tokens, max_new_tokens=1))

    def told(reports):
        return [r for r in reports if isinstance(r, BlocksStored) and name in r.hashes]

    assert len(await small.told(lambda r: len(told(r)) == 3 and told(r))) == 3


async def test_a_killed_core_ends_its_streams_and_not_the_others(small, other):
    calls = [
        Call(
            request=request(f"cut{k}", prompt(20, salt=k), max_new_tokens=400),
            sampling=GREEDY,
        )
        for k in range(3)
    ]
    seen = asyncio.Queue()

    async def read(call):
        async for piece in small.engine.generate(call):
            seen.put_nowait(piece)

    readers = [asyncio.create_task(read(call)) for call in calls]
    death = asyncio.create_task(small.engine.died())
    for _ in range(6):
        await asyncio.wait_for(seen.get(), 30)
    (core,) = small.engine._cores
    os.kill(core.pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        ended = await asyncio.gather(*readers, return_exceptions=True)
        assert "exited" in await death
    assert [type(error) for error in ended] == [WorkerLost] * 3
    with pytest.raises(WorkerLost):
        await small.answer(request("late", prompt(20)))
    await small.engine.abort("cut0")
    assert len(tokens_of(await other.answer(request("on", prompt(20))))) == 8


async def test_stop_leaves_nothing(small, other):
    stream = other.engine.generate(
        Call(request=request("cut", prompt(20), max_new_tokens=900), sampling=GREEDY)
    )
    await anext(stream)
    death = asyncio.create_task(other.engine.died())
    scratch = Path(other.engine._scratch)
    await asyncio.gather(other.engine.stop(), other.engine.stop())
    await other.engine.stop()
    async with asyncio.timeout(5):
        rest = [piece async for piece in stream]
    assert rest[-1].finish_reason == "abort"
    await small.engine.stop()
    assert cores() == []
    assert not scratch.exists()  # noqa: ASYNC240
    assert not death.done(), "a stopped engine did not die"
    death.cancel()
    with pytest.raises(EngineError):
        await other.answer(request("late", prompt(20)))


async def test_what_cannot_start_leaves_nothing(tmp_path):
    engine = VllmEngine(tmp_path / "nothing", options=OPTIONS)
    with pytest.raises(EngineError, match="nothing"):
        async with running(engine, "none"):
            pass
    assert cores() == []


async def test_a_start_that_is_cut_short_leaves_nothing(models):
    engine = VllmEngine(models[0], options=OPTIONS, start_timeout=0.5)
    with pytest.raises(EngineError):
        async with running(engine, "cut"):
            pass
    async with asyncio.timeout(60):
        while launch._starting.locked() or cores():  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def a_core():
    """Wait for the process of a core that is started; return it."""
    while True:
        await asyncio.sleep(0.01)
        for core in multiprocessing.active_children():
            if core.name == "EngineCore":
                return core


async def test_a_core_that_does_not_come_up_is_killed(models):
    """vLLM by itself waits for it for ever, and every later engine with it."""

    async def freeze():
        core = await a_core()
        os.kill(core.pid, signal.SIGSTOP)
        return core

    freezing = asyncio.create_task(freeze())
    engine = VllmEngine(models[0], options=OPTIONS, start_timeout=20)
    with pytest.raises(EngineError, match="did not get"):
        async with running(engine, "frozen"):
            pass
    core = await freezing
    async with asyncio.timeout(60):
        while launch._starting.locked() or cores():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert core.exitcode == -signal.SIGKILL
    async with running(VllmEngine(models[0], options=OPTIONS), "next") as after:
        assert len(tokens_of(await after.answer(request("on", prompt(20))))) == 8


@pytest.mark.parametrize("frozen", [False, True])
async def test_stop_ends_an_engine_that_starts(models, frozen):
    engine = VllmEngine(models[0], options=OPTIONS)
    start = asyncio.create_task(Running(engine).start("half"))
    async with asyncio.timeout(60):
        core = await a_core()
        if frozen:
            os.kill(core.pid, signal.SIGSTOP)
        await engine.stop()
        with pytest.raises(EngineError, match="stopped while it started"):
            await start
        while launch._starting.locked() or cores():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert engine._llm is None


async def test_nothing_keeps_an_engine_that_was_stopped(models):
    """Collected at exit, vLLM's own clean-up would fail, and say so."""
    engine = VllmEngine(models[0], options=OPTIONS)
    await Running(engine).start("brief")
    llm = weakref.ref(engine._llm)
    await engine.stop()
    gc.collect()
    assert llm() is None


@pytest.mark.parametrize("turns", [0, 1, 2, 5])
async def test_a_stop_that_is_cancelled_ends_the_engine_all_the_same(models, turns):
    engine = VllmEngine(models[0], options=OPTIONS)
    await Running(engine).start("cut")
    stop = asyncio.create_task(engine.stop())
    for _ in range(turns):
        await asyncio.sleep(0)
    stop.cancel()
    await asyncio.wait([stop])
    await engine.stop()
    assert cores() == []


def test_salts_give_names_of_their_own():
    plain = request("a", prompt(64)).hashes(BLOCK_TOKENS)
    salted = request("b", prompt(64), salt="tenant-a").hashes(BLOCK_TOKENS)
    assert not np.isin(plain, salted).any()
