"""A row of the matrix, and what rows have in common."""

import contextlib
from collections.abc import Awaitable, Callable

import attrs

import llmd
from llmd.adapters.vllm.engine import VllmEngine
from llmd.live import Server

GREEDY = {"temperature": 0.0, "ignore_eos": True}
OPTIONS = {"max_model_len": 1024, "kv_cache_memory_bytes": 32 << 20}


@attrs.frozen
class Row:
    """One line of the matrix; without a test it is not built yet."""

    number: int
    feature: str
    asked: str
    test: Callable[[str], Awaitable[tuple[bool, str]]] | None = None


def llmd_blend() -> llmd.Router:
    """Return the study's weights: prefix 3, KV utilisation 2, queue 2."""
    return 3 * llmd.PrefixOverlap() + 2 * llmd.KVHeadroom() + 2 * llmd.QueueDepth()


@contextlib.asynccontextmanager
async def fleet(model, cluster, *options, names=(), count=2):
    """Start engines a, b, ... behind a server."""
    async with Server(cluster) as server:
        for index in range(count):
            more = options[index] if index < len(options) else {}
            engine = VllmEngine(model, names=names, options={**OPTIONS, **more})
            await server.add(engine, "abcdefgh"[index])
        yield server


async def ask(server, id, prompt, new=8, **fields):
    """Return the tokens, the engine's cached-token count and the decision."""
    request = llmd.Request(id=id, prompt=prompt, max_new_tokens=new, **fields)
    tokens, cached, decision = [], 0, None
    async for output in server.generate(request, GREEDY):
        decision = decision or server.cluster.runs(id)
        tokens += output.token_ids
        cached = output.cached_tokens or cached
    return tokens, cached, decision


def prefix(seed, tokens):
    """Make token ids that other seeds share no block with."""
    return [(k * 7 + (seed + 1) * 101 + k * seed) % 400 + 4 for k in range(tokens)]


def counted(server, name):
    """Return a counter of each engine, as it counts itself."""
    return {id: engine.counters[name] for id, engine in server.engines.items()}
