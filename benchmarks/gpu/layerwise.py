"""Time to first token of P/D requests, layers going all at once and one by one.

    PYTHONPATH=src python benchmarks/gpu/layerwise.py [--visible 0,1 1,0] [--json PATH]

Two vLLM engines of a 7B shape (Qwen2.5, random weights) behind `llmd.live.Server`,
on one GPU or where `--visible` says (the GPUs that each sees, its own first), with
`transfer_config(layerwise=...)` off and then on.  `beyond` is how much later the
first token comes than the prompt alone takes on the prefill engine; tokens must be
those of the prefill engine.  The last line printed is the result as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time

import handoff

import llmd
from llmd.adapters.vllm.connector_config import transfer_config
from llmd.adapters.vllm.engine import VllmEngine
from llmd.live import Server

LENGTHS = (2048, 8192, 32000)
ROUNDS = 5
GREEDY = {"temperature": 0.0, "ignore_eos": True}


class To(llmd.Router):
    """Sends everything from one engine to another, or all to one."""

    prefill = decode = "p"

    def cost(self, request, view):
        return [0.0] * len(view.workers)

    def route(self, request, view):
        return llmd.Decision(self.decode, prefill=self.prefill)


def engine(role: str, layerwise: bool, visible: str) -> VllmEngine:
    config = transfer_config(role=role, staging_bytes=4 << 30, layerwise=layerwise)
    options = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "gpu_memory_utilization": 0.36,
        "max_model_len": 32_768,
        "max_num_seqs": 64,
        "kv_transfer_config": config,
    }
    return VllmEngine(
        handoff.model_directory(),
        names=["shape"],
        options=options,
        environment={"CUDA_VISIBLE_DEVICES": visible} if visible else {},
    )


async def asked(server: Server, ids: list[int], name: str) -> tuple[float, list[int]]:
    request = llmd.Request(id=name, prompt=ids, max_new_tokens=8)
    begun, first, tokens = time.perf_counter(), None, []
    async with asyncio.timeout(60):
        async for piece in server.generate(request, GREEDY):
            first = first or time.perf_counter() - begun
            tokens += piece.token_ids
    assert first is not None
    return first, tokens


async def measure(layerwise: bool, visible: list[str]) -> list[dict]:
    rng, rows, router = random.Random(3), [], To()
    async with Server(llmd.Cluster(router)) as server:
        roles = (("kv_producer", "p"), ("kv_consumer", "d"))
        for (role, name), sees in zip(roles, visible, strict=True):
            await server.add(engine(role, layerwise, sees), name)

        async def one(tokens: int, name: str) -> dict:
            ids = [rng.randrange(1000, 150_000) for _ in range(tokens)]
            router.prefill, router.decode = "p", "d"
            handed, got = await asked(server, ids, f"{name}-handed")
            router.prefill = router.decode = "p"
            hit, wanted = await asked(server, ids, f"{name}-hit")
            other = [rng.randrange(1000, 150_000) for _ in range(tokens)]
            alone, _ = await asked(server, other, f"{name}-alone")
            return {
                "handed_ms": 1e3 * handed,
                "hit_ms": 1e3 * hit,
                "alone_ms": 1e3 * alone,
                "same": got == wanted,
            }

        for tokens in (512, 8192):
            await one(tokens, f"warm{tokens}")
        for tokens in LENGTHS:
            found = [await one(tokens, f"r{tokens}-{n}") for n in range(ROUNDS)]
            middle = {
                name: statistics.median(row[name] for row in found)
                for name in ("handed_ms", "hit_ms", "alone_ms")
            }
            beyond = statistics.median(r["handed_ms"] - r["alone_ms"] for r in found)
            rows.append(
                {
                    "layerwise": layerwise,
                    "tokens": tokens,
                    **middle,
                    "beyond_ms": beyond,
                    "same": all(row["same"] for row in found),
                    "prefill_failures": server.counts["prefill_failures"],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--visible", nargs=2, default=["", ""], metavar="GPUS")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args()
    handoff.set_environment()
    rows = []
    for layerwise in (False, True):
        rows += asyncio.run(measure(layerwise, options.visible))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
