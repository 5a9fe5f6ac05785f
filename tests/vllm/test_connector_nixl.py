"""vLLM's own NIXL connector through llmd: a lapsed lease must not give wrong tokens."""

import asyncio
import contextlib
import random
import socket
import time

import pytest

pytest.importorskip("nixl")

from llmd.adapters.vllm.connector_config import nixl_config
from llmd.adapters.vllm.engine import VllmEngine
from llmd.adapters.vllm.tiny import make_model
from llmd.errors import EngineError
from llmd.live.engine import Call
from llmd.types import Request

GREEDY = {"temperature": 0.0, "ignore_eos": True}
LEASE_S = 6


def engine(model, role, **environment):
    return VllmEngine(
        model,
        options={
            "max_model_len": 2048,
            "block_size": 32,
            "kv_cache_memory_bytes": 4 << 20,
            "skip_tokenizer_init": True,
            "kv_transfer_config": nixl_config(role=role, lease_s=LEASE_S, cpu=True),
        },
        environment={"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", **environment},
    )


def asked(name, tokens, seed, new=8):
    rng = random.Random(seed)
    prompt = [rng.randrange(4, 500) for _ in range(tokens)]
    return Request(id=name, prompt=prompt, max_new_tokens=new)


async def answer(engine, request, **call):
    async with asyncio.timeout(60):
        wanted = Call(request=request, sampling=GREEDY, **call)
        return [piece async for piece in engine.generate(wanted)]


def tokens(pieces):
    return [token for piece in pieces for token in piece.token_ids]


async def started(stack, one, name):
    stack.push_async_callback(one.stop)
    await one.start(name, lambda report: None, lambda state: None)
    return one


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny", tokenizer=False)


@pytest.fixture(scope="module")
async def engines(model):
    """Two engines, each at a port that nobody chose."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await started(stack, engine(model, "kv_producer"), "p"),
            await started(stack, engine(model, "kv_consumer"), "d"),
        ]


async def test_a_hand_off_in_time_gives_the_tokens_of_one_engine(engines):
    prefill, decode = engines
    for seed, length in enumerate((20, 100, 500)):
        pieces = await answer(
            prefill, asked(f"p{seed}", length, seed), prefill_only=True
        )
        transfer = pieces[-1].kv_transfer
        got = await answer(
            decode, asked(f"d{seed}", length, seed), kv_transfer=transfer
        )
        want = await answer(prefill, asked(f"w{seed}", length, seed))
        assert tokens(got) == tokens(want)
    assert decode.counters["external_prefix_cache_hits"] > 500


async def test_a_lapsed_hand_off_is_computed_and_right(engines):
    """vLLM's connector by itself answers this with other tokens and no error."""
    prefill, decode = engines
    pieces = await answer(prefill, asked("lp", 500, 50), prefill_only=True)
    transfer = pieces[-1].kv_transfer
    until, filler = time.monotonic() + LEASE_S + 2, 0
    while time.monotonic() < until:  # the blocks are freed and reused
        filler += 1
        await answer(prefill, asked(f"x{filler}", 1200, 100 + filler, new=2))
        await asyncio.sleep(0.2)
    before = decode.counters["external_prefix_cache_hits"]
    got = await answer(decode, asked("ld", 500, 50), kv_transfer=transfer)
    want = await answer(prefill, asked("lw", 500, 50))
    assert tokens(got) == tokens(want)
    assert decode.counters["external_prefix_cache_hits"] == before


async def test_a_port_that_is_taken_is_told_at_once(model):
    """vLLM's connector by itself waits for ever, and its engine with it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        one = engine(model, "kv_producer", VLLM_NIXL_SIDE_CHANNEL_PORT=port)
        async with contextlib.AsyncExitStack() as stack, asyncio.timeout(120):
            with pytest.raises(EngineError, match=f"PORT {port} of 127.0.0.1"):
                await started(stack, one, "late")
