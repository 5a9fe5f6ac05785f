"""Prefill on one real engine, decode on another, KV handed over in between.

Run where vLLM and NIXL are installed: python examples/disaggregated.py
Short prompts stay on the decode engine, and the decision says why.
"""

import asyncio
import secrets
import sys

import llmd
from llmd.adapters.vllm.connector_config import transfer_config
from llmd.adapters.vllm.engine import VllmEngine
from llmd.adapters.vllm.tiny import make_model
from llmd.live import Server

OPTIONS = {"max_model_len": 1024, "kv_cache_memory_bytes": 16 << 20}
ROLES = {"prefill-0": "kv_producer", "decode-0": "kv_consumer"}


def engine(model: str, role: str, key: str) -> VllmEngine:
    config = transfer_config(role=role, staging_bytes=16 << 20)
    return VllmEngine(
        model,
        options={**OPTIONS, "kv_transfer_config": config},
        environment={"LLMD_KV_KEY": key},  # all engines share it
    )


async def main(model: str) -> None:
    router = llmd.Disaggregated(min_uncached_tokens=32)
    key = secrets.token_hex(32)
    async with Server(llmd.Cluster(router=router)) as server:
        for worker, role in ROLES.items():
            await server.add(engine(model, role, key), worker)
        tokenize = server.engine("decode-0").tokenize
        story = "Once upon a time, in a data centre by the sea, " * 8
        for number, prompt in enumerate(("Hello", story + "who", story + "where")):
            request = llmd.Request(
                id=f"r{number}", prompt=await tokenize(prompt), max_new_tokens=16
            )
            tokens, decision = [], None
            async for output in server.generate(request, {"temperature": 0}):
                decision = decision or server.cluster.runs(request.id)
                tokens += output.token_ids
            print(f"{request.id}: {request.prompt_tokens} tokens of prompt")
            print(f"   {decision.explain().verdict[-1]}")
            print(f"   {len(tokens)} tokens from {decision.decode}")
        for worker in ROLES:
            counters = server.engine(worker).counters
            handed = counters["external_prefix_cache_hits"]
            print(f"{worker}: {handed} tokens of KV came from another engine")


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else str(make_model(".models/tiny"))
    asyncio.run(main(model))
