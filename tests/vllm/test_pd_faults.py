"""P/D behind the live server while the prefill engine hangs and dies."""

import asyncio
import os
import random
import signal

import pytest

pytest.importorskip("nixl")
pytest.importorskip("xxhash")

import llmd
from llmd.adapters.vllm.connector_config import transfer_config
from llmd.adapters.vllm.engine import VllmEngine
from llmd.adapters.vllm.tiny import make_model
from llmd.live import Call, Server

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def engine(model, role):
    config = transfer_config(role=role, staging_bytes=16 << 20, timeout_s=20.0)
    return VllmEngine(
        model,
        options={
            "max_model_len": 2048,
            "block_size": 32,
            "kv_cache_memory_bytes": 16 << 20,
            "skip_tokenizer_init": True,
            "kv_transfer_config": config,
        },
        environment={"LLMD_KV_KEY": "shared by the engines of this test"},
    )


@pytest.fixture(scope="module")
async def server(tmp_path_factory):
    model = make_model(tmp_path_factory.mktemp("models") / "tiny", tokenizer=False)
    router = llmd.Disaggregated(min_uncached_tokens=16)
    async with Server(llmd.Cluster(router=router), prefill_timeout=20.0) as server:
        await server.add(engine(model, "kv_producer"), "p0")
        await server.add(engine(model, "kv_consumer"), "d0")
        yield server


def asked(name, seed, tokens=700):
    rng = random.Random(seed)
    prompt = [rng.randrange(4, 500) for _ in range(tokens)]
    return llmd.Request(id=name, prompt=prompt, max_new_tokens=8)


async def answer(server, request):
    async with asyncio.timeout(90):
        outputs = [piece async for piece in server.generate(request, GREEDY)]
    return [token for piece in outputs for token in piece.token_ids]


async def alone(server, request):
    """Answer on the decode engine without the prefix it may hold by now."""
    salted = llmd.Request(
        id=f"alone-{request.id}",
        prompt=request.prompt,
        max_new_tokens=8,
        salt="apart",
    )
    call = Call(request=salted, sampling=GREEDY)
    pieces = [piece async for piece in server.engine("d0").generate(call)]
    return [token for piece in pieces for token in piece.token_ids]


def core(server, worker):
    (process,) = server.engine(worker)._cores
    return process.pid


async def test_a_prefill_engine_that_hangs_after_the_hand_off(server):
    """The decode engine notices, computes the prompt itself, and is right."""
    pid, frozen = core(server, "p0"), asyncio.Event()

    def freeze(seen):
        if isinstance(seen, llmd.events.PrefillEnded):
            os.kill(pid, signal.SIGSTOP)
            frozen.set()

    server.cluster.observer = freeze
    try:
        got = await answer(server, asked("hung", 1))
    finally:
        server.cluster.observer = None
        os.kill(pid, signal.SIGCONT)
    assert frozen.is_set()
    assert got == await alone(server, asked("hung", 1))
    # Awake again, it serves as before.
    before = server.engine("d0").counters["external_prefix_cache_hits"]
    got = await answer(server, asked("awake", 2))
    assert got == await alone(server, asked("awake", 2))
    assert server.engine("d0").counters["external_prefix_cache_hits"] == before + 699


async def test_a_prefill_engine_killed_while_it_computes_costs_no_answer(server):
    requests = [asked(f"k{n}", 10 + n, 1500) for n in range(6)]
    answers = [asyncio.create_task(answer(server, request)) for request in requests]
    await asyncio.sleep(0.15)
    os.kill(core(server, "p0"), signal.SIGKILL)
    got = await asyncio.gather(*answers)
    for request, tokens in zip(requests, got, strict=True):
        assert tokens == await alone(server, request)
    assert "p0" not in server.engines
    late = await answer(server, asked("late", 99))
    assert late == await alone(server, asked("late", 99))
    workers = server.cluster.view.workers
    assert workers.ids == ("d0",)
    assert not workers.running_requests.any()
    assert not workers.prefill_tokens.any()
