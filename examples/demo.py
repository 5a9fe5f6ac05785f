"""The main job, seen: two real vLLM engines behind one llmd, and the proof.

Ends with a table: what was asked, and what the engines themselves say of it.
"""

import asyncio
import logging
import sys
import time

import llmd
from llmd.adapters.vllm.engine import VllmEngine
from llmd.adapters.vllm.tiny import make_model
from llmd.live import Server

OPTIONS = {"max_model_len": 1024, "kv_cache_memory_bytes": 16 << 20}
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def prompts() -> dict[str, list[list[int]]]:
    """Make three prefixes of 220 tokens and five short questions behind each."""
    shared = [[(k * 7 + 101 * p) % 400 + 4 for k in range(220)] for p in range(3)]
    return {
        f"prefix {p}": [[*head, 30 + q, 40 + q, 50 + q] for q in range(5)]
        for p, head in enumerate(shared)
    }


async def answer(server, id, prompt):
    request = llmd.Request(id=id, prompt=prompt, max_new_tokens=12)
    tokens, cached, decision = [], 0, None
    async for output in server.generate(request, GREEDY):
        decision = server.cluster.runs(id) or decision
        tokens += output.token_ids
        cached = output.cached_tokens or cached
    return tokens, cached, decision


async def conversation(server, name, asked):
    """Ask one prefix's questions, one after another."""
    return [await answer(server, f"{name}-{q}", p) for q, p in enumerate(asked)]


async def run(model: str, *workers: str):
    """Run the three conversations side by side on these engines."""
    router = 3 * llmd.PrefixOverlap() + 2 * llmd.KVHeadroom() + 2 * llmd.QueueDepth()
    async with Server(llmd.Cluster(router=router)) as server:
        for worker in workers:
            await server.add(VllmEngine(model, options=OPTIONS), worker)
        talks = (conversation(server, *item) for item in prompts().items())
        return await asyncio.gather(*talks)


async def main(model: str) -> bool:
    started = time.monotonic()
    alone = await run(model, "single")
    fleet = await run(model, "engine-a", "engine-b")
    same = [[t for t, *_ in talk] for talk in fleet] == [
        [t for t, *_ in talk] for talk in alone
    ]
    print(f"\nWhy the last request went there:\n\n{fleet[-1][-1][2].explain()}\n")
    print("prefix    engines of its 5 requests   cached tokens, by the engine's count")
    rows = [([d.decode for *_, d in talk], [c for _, c, _ in talk]) for talk in fleet]
    for name, (workers, cached) in zip(prompts(), rows, strict=True):
        print(f"{name:8}  {', '.join(sorted(set(workers))):26}  {cached}")
    together = all(len(set(workers)) == 1 for workers, _ in rows)
    hits = all(min(cached[1:]) > 0 for _, cached in rows)
    spread = len({workers[0] for workers, _ in rows}) == 2
    for what, held in (
        ("every request of a prefix on one engine", together),
        ("both engines used", spread),
        ("the engines found cached tokens", hits),
        ("tokens identical to a single engine's", same),
    ):
        print(f"{'yes' if held else 'NO ':4} {what}")
    print(f"in {time.monotonic() - started:.0f} s")
    return together and spread and hits and same


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    model = sys.argv[1] if len(sys.argv) > 1 else str(make_model(".models/tiny"))
    sys.exit(0 if asyncio.run(main(model)) else 1)
