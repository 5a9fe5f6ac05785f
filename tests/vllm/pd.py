"""What tests of prefill and decode engines share."""

import asyncio
import random

import llmd
from llmd.adapters.vllm.connector_config import transfer_config
from llmd.adapters.vllm.engine import VllmEngine

GREEDY = {"temperature": 0.0, "ignore_eos": True}
KEY = "shared by the engines of a test"
OPTIONS = {
    "max_model_len": 2048,
    "block_size": 32,
    "kv_cache_memory_bytes": 16 << 20,
    "skip_tokenizer_init": True,
}
OFFER_S = 5.0
_HELD = ("offers", "fetches", "writes", "quarantined_blocks")


def engine(model, role, *, key=KEY, made=VllmEngine, **config):
    """Return an engine with llmd's connector that tells what it holds."""
    config = {"staging_bytes": 16 << 20, "offer_s": OFFER_S, **config}
    options = {
        **OPTIONS,
        "kv_transfer_config": transfer_config(role=role, **config),
    }
    return made(model, options=options, environment={"LLMD_KV_KEY": key})


def asked(name, seed, tokens=700, new_tokens=8):
    rng = random.Random(seed)
    prompt = [rng.randrange(4, 500) for _ in range(tokens)]
    return llmd.Request(id=name, prompt=prompt, max_new_tokens=new_tokens)


async def rest(stream):
    return [token async for piece in stream for token in piece.token_ids]


async def answer(server, request):
    async with asyncio.timeout(90):
        return await rest(server.generate(request, GREEDY))


def core(server, worker):
    (process,) = server.engine(worker)._cores
    return process.pid


async def transfer_counts(server, worker):
    (counts,) = await server.engine(worker).transfer_counts()
    return counts


async def let_go(server, worker, peers):
    """Wait until *worker* holds nothing of any transfer, and knows *peers* peers."""
    for _ in range(200):
        counts = await transfer_counts(server, worker)
        busy = any(counts[name] for name in _HELD)
        whole = counts["free_slots"] == counts["staging_slots"]
        if not busy and whole and counts["peers"] in peers:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{worker} still holds {counts}")
