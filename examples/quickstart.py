"""Two real vLLM engines, one router, streamed answers and a reason for each.

Run with `nox -s demo`, or where vLLM is installed: python examples/quickstart.py
"""

import asyncio
import sys

import llmd
from llmd.adapters.vllm.engine import VllmEngine
from llmd.adapters.vllm.tiny import make_model
from llmd.live import Server

OPTIONS = {"max_model_len": 1024, "kv_cache_memory_bytes": 16 << 20}


async def main(model: str) -> None:
    router = 3 * llmd.PrefixOverlap() + 2 * llmd.KVHeadroom() + 2 * llmd.QueueDepth()
    async with Server(llmd.Cluster(router=router)) as server:
        for worker in ("a", "b"):
            await server.add(VllmEngine(model, options=OPTIONS), worker)
        tokenize = server.engine("a").tokenize
        story = "Once upon a time, in a data centre by the sea, " * 4
        for number, question in enumerate(("who", "where", "why")):
            request = llmd.Request(
                id=f"r{number}",
                prompt=await tokenize(story + question),
                max_new_tokens=16,
            )
            cached, decision = 0, None
            async for output in server.generate(request, {"temperature": 0}):
                cached = output.cached_tokens or cached
                decision = server.cluster.runs(request.id) or decision
            print(f"{request.id} on {decision.decode}, {cached} tokens were cached")
        print(decision.explain())


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else str(make_model(".models/tiny"))
    asyncio.run(main(model))
