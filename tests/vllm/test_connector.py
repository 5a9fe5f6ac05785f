"""llmd's own KV transport between two real engines: tokens as if there were one."""

import asyncio
import contextlib
import os
import random
import signal

import pytest

pytest.importorskip("nixl")
pytest.importorskip("xxhash")

from llmd.adapters.vllm.connector_config import transfer_config
from llmd.adapters.vllm.engine import VllmEngine
from llmd.adapters.vllm.tiny import make_model
from llmd.live.engine import Call
from llmd.types import Request

GREEDY = {"temperature": 0.0, "ignore_eos": True}
KEY = "a key that engines of this test share"
OPTIONS = {"max_model_len": 2048, "block_size": 32, "kv_cache_memory_bytes": 16 << 20}


def engine(model, role, environment=None, **config):
    return VllmEngine(
        model,
        options={
            **OPTIONS,
            "kv_transfer_config": transfer_config(
                role=role, staging_bytes=16 << 20, **config
            ),
        },
        environment={"LLMD_KV_KEY": KEY, **(environment or {})},
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny", tokenizer=False)


class Running:
    """A started engine."""

    def __init__(self, engine):
        self.engine = engine

    async def start(self, name):
        await self.engine.start(name, lambda report: None, lambda state: None)

    async def answer(self, request, **call):
        async with asyncio.timeout(120):
            wanted = Call(request=request, sampling=GREEDY, **call)
            return [piece async for piece in self.engine.generate(wanted)]


class Pair:
    """A prefill and a decode engine, and the two legs of a request."""

    def __init__(self, model, **config):
        tokens = {"skip_tokenizer_init": True}
        self.prefill = Running(engine(model, "kv_producer", **config))
        self.decode = Running(engine(model, "kv_consumer", **config))
        for running in (self.prefill, self.decode):
            running.engine._options.update(tokens)

    async def start(self):
        await self.prefill.start("p")
        await self.decode.start("d")
        return self

    async def stop(self):
        await self.prefill.engine.stop()
        await self.decode.engine.stop()

    async def hand_over(self, request):
        outputs = await self.prefill.answer(request, prefill_only=True)
        return outputs[-1].kv_transfer

    async def decoded(self, request, transfer):
        outputs = await self.decode.answer(request, kv_transfer=transfer)
        return [token for piece in outputs for token in piece.token_ids]

    async def plain(self, request):
        """Answer on the prefill engine alone."""
        outputs = await self.prefill.answer(request)
        return [token for piece in outputs for token in piece.token_ids]


@pytest.fixture(scope="module")
async def pair(model):
    pair = await Pair(model, timeout_s=5.0).start()
    yield pair
    await pair.stop()


def asked(name, tokens, seed, new=12):
    rng = random.Random(seed)
    prompt = [rng.randrange(4, 500) for _ in range(tokens)]
    return Request(id=name, prompt=prompt, max_new_tokens=new)


async def test_tokens_are_those_of_one_engine_for_50_prompts(pair):
    rng = random.Random(0)
    lengths = [20, 32, 33, 64, 65, 1500] + [rng.randrange(20, 1500) for _ in range(44)]
    for i, tokens in enumerate(lengths):
        transfer = await pair.hand_over(asked(f"p{i}", tokens, i))
        assert transfer is not None
        got = await pair.decoded(asked(f"d{i}", tokens, i), transfer)
        want = await pair.plain(asked(f"w{i}", tokens, i))
        assert got == want, f"prompt {i} of {tokens} tokens"
    # By the decode engine's own count, all came from the prefill engine.
    hits = pair.decode.engine.counters["external_prefix_cache_hits"]
    assert hits == sum(tokens - 1 for tokens in lengths)


async def test_at_once_too(pair):
    async def both(i):
        request = asked(f"cp{i}", 300 + i, 1000 + i)
        transfer = await pair.hand_over(request)
        return await pair.decoded(asked(f"cd{i}", 300 + i, 1000 + i), transfer)

    found = await asyncio.gather(*(both(i) for i in range(12)))
    for i, got in enumerate(found):
        assert got == await pair.plain(asked(f"cw{i}", 300 + i, 1000 + i))


async def test_a_hand_off_that_lapsed_is_computed_and_right(pair):
    """What vLLM's own connector answers with wrong tokens and no error."""
    request = asked("lp", 500, 77)
    transfer = dict(await pair.hand_over(request))
    # Another generation is what a lapsed or evicted offer looks like.
    transfer["llmd_generation"] = str(int(transfer["llmd_generation"]) ^ 1)
    got = await pair.decoded(asked("ld", 500, 77), transfer)
    assert got == await pair.plain(asked("lw", 500, 77))


async def test_a_forged_address_is_computed_and_right(pair):
    transfer = dict(await pair.hand_over(asked("fp", 200, 78)))
    other = {"0": transfer["llmd_addresses"]["0"][:-8] + "AAAAAAA="}
    transfer["llmd_addresses"] = other
    got = await pair.decoded(asked("fd", 200, 78), transfer)
    assert got == await pair.plain(asked("fw", 200, 78))


async def test_a_client_that_leaves_in_the_middle_leaks_nothing(pair):
    for i in range(6):
        transfer = await pair.hand_over(asked(f"ap{i}", 900, 200 + i))
        call = Call(
            request=asked(f"ad{i}", 900, 200 + i), sampling=GREEDY, kv_transfer=transfer
        )
        stream = pair.decode.engine.generate(call)
        task = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.003 * i)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task  # a fast engine may have answered: it left all the same
        await stream.aclose()
    transfer = await pair.hand_over(asked("zp", 900, 300))
    got = await pair.decoded(asked("zd", 900, 300), transfer)
    assert got == await pair.plain(asked("zw", 900, 300))


async def test_a_prefill_engine_killed_after_the_hand_off(model, pair):
    """Kept last: it ends the shared prefill engine."""
    request = asked("kp", 700, 90)
    transfer = await pair.hand_over(request)
    want = await pair.plain(asked("kw", 700, 90))
    (core,) = pair.prefill.engine._cores
    os.kill(core.pid, signal.SIGKILL)
    got = await pair.decoded(asked("kd", 700, 90), transfer)
    assert got == want
