"""Rows 1 to 6: prefix-cache routing, balancing, explaining, several models."""

import asyncio

import llmd
from llmd.adapters.vllm.engine import VllmEngine
from llmd.errors import UnknownModel

from .row import ask, counted, fleet, llmd_blend, prefix

SYSTEM_TOKENS = 220


def _ceiling(prompts, block):
    """Tokens a cache of full blocks can find at most, prompts in this order."""
    found, seen = 0, set()
    for prompt in prompts:
        # The last token of a prompt is always computed.
        usable = [tuple(prompt[:end]) for end in range(block, len(prompt), block)]
        found += block * sum(head in seen for head in usable)
        seen.update(tuple(prompt[:e]) for e in range(block, len(prompt) + 1, block))
    return found


async def approximate_routing(model):
    cluster = llmd.Cluster(router=llmd_blend(), index=llmd.GuessedIndex())
    block = {"block_size": 128}
    prompts = [[*prefix(1, SYSTEM_TOKENS), 30 + q, 90 + q] for q in range(5)]
    async with fleet(model, cluster, block, block) as server:
        for number, prompt in enumerate(prompts):
            await ask(server, f"r{number}", prompt)
        served = counted(server, "request_success")
        hits = sum(counted(server, "prefix_cache_hits").values())
        queries = sum(counted(server, "prefix_cache_queries").values())
    ceiling = _ceiling(prompts, 128)
    passed = sorted(served.values()) == [0, 5] and hits == ceiling
    said = f"requests {served}, hits/queries {hits}/{queries}, ceiling {ceiling}"
    return passed, said


async def precise_routing(model):
    # No grace: only what the engines' events said may count.
    cluster = llmd.Cluster(router=llmd_blend(), index=llmd.ExactIndex(grace=0.0))
    sizes = ({"block_size": 32}, {"block_size": 64})
    said, passed = [], True
    async with fleet(model, cluster, *sizes) as server:
        for seed in (1, 2, 3, 4):
            before = counted(server, "request_success")
            prompts = [[*prefix(seed, SYSTEM_TOKENS), 30 + q] for q in range(5)]
            for number, prompt in enumerate(prompts):
                *_, decision = await ask(server, f"p{seed}-{number}", prompt)
                await asyncio.sleep(0.1)
            after = counted(server, "request_success")
            (worker,) = (id for id in after if after[id] > before[id])
            scores = dict(
                zip(decision.candidates, decision.terms[0].raw.tolist(), strict=True)
            )
            matched = scores.pop(worker)
            passed &= after[worker] - before[worker] == 5
            passed &= matched > 0.8 and max(scores.values()) == 0
            said.append(f"{worker} matched {matched:.2f}, other {[*scores.values()]}")
        hits = counted(server, "prefix_cache_hits")
        queries = counted(server, "prefix_cache_queries")
    return passed, f"{'; '.join(said)}; hits {hits} of {queries}"


async def new_prefix(model):
    cluster = llmd.Cluster(router=llmd_blend())
    async with fleet(model, cluster) as server:
        busy = prefix(1, SYSTEM_TOKENS)
        *_, decision = await ask(server, "warm", busy)
        loaded = decision.decode
        load = [
            asyncio.create_task(ask(server, f"busy{n}", [*busy, 30 + n], new=400))
            for n in range(4)
        ]
        await asyncio.sleep(0.3)
        placed = []
        for number in range(4):
            prompt = [*prefix(7, SYSTEM_TOKENS), 40 + number]
            *_, decision = await ask(server, f"new{number}", prompt)
            placed.append(decision.decode)
        still = sum(not task.done() for task in load)
        served = counted(server, "request_success")
        await asyncio.gather(*load)
    idle = "b" if loaded == "a" else "a"
    passed = served[idle] == 4 and still > 0
    return passed, f"busy {loaded} ({still} running), finished by {idle}: {served}"


async def queue_balancing(model):
    cluster = llmd.Cluster(router=llmd_blend())
    async with fleet(model, cluster) as server:
        shared = prefix(1, SYSTEM_TOKENS)
        *_, decision = await ask(server, "warm", shared)
        before = counted(server, "request_success")
        await asyncio.gather(
            *(ask(server, f"r{n}", [*shared, 30 + n], new=512) for n in range(30))
        )
        after = counted(server, "request_success")
        tokens = counted(server, "generation_tokens")
    split = {worker: after[worker] - before[worker] for worker in after}
    passed = sum(split.values()) == 30 and min(split.values()) >= 10
    said = f"split {split}, affinity was on {decision.decode}, generated {tokens}"
    return passed, said


async def kv_scoring(model):
    cluster = llmd.Cluster(router=llmd_blend())
    async with fleet(model, cluster) as server:
        shared = prefix(1, SYSTEM_TOKENS)
        await ask(server, "warm", shared)
        load = asyncio.create_task(ask(server, "load", [*shared, 1], new=300))
        await asyncio.sleep(0.3)
        *_, decision = await ask(server, "asked", [*shared, 2])
        await load
    weights = [-term.weight for term in decision.terms]
    total = sum(term.weight * term.value for term in decision.terms)
    usage = decision.terms[1].raw
    print(decision.explain())
    passed = (
        weights == [3.0, 2.0, 2.0]
        and abs(total - decision.costs).max() < 1e-12
        and usage.max() > 0
        and decision.costs.argmin() == decision.candidates.index(decision.decode)
    )
    scores = [
        f"{worker} "
        + " + ".join(f"{-t.weight:g} x {t.value[row]:.3f}" for t in decision.terms)
        + f" = {-decision.costs[row]:.3f}"
        for row, worker in enumerate(decision.candidates)
    ]
    return passed, f"prefix, KV, queue: {'; '.join(scores)}; to {decision.decode}"


async def several_models(model):
    cluster = llmd.Cluster(router=llmd_blend())
    answered = 0
    async with fleet(model, cluster, names=("first",), count=1) as server:
        stop = asyncio.Event()

        async def stream_of(name):
            nonlocal answered
            while not stop.is_set():
                id = f"{name}-{answered}"
                await ask(server, id, prefix(2, 64), model=name)
                answered += 1

        steady = asyncio.create_task(stream_of("first"))
        refused = 0
        try:
            await ask(server, "early", prefix(3, 64), model="second")
        except UnknownModel:
            refused += 1
        await server.add(VllmEngine(model, names=("second",)), "late")
        _, _, decision = await ask(server, "now", prefix(3, 64), model="second")
        late = server.engine("late").counters["request_success"]
        await server.remove("late")
        server.remove_model("second")
        try:
            await ask(server, "gone", prefix(3, 64), model="second")
        except UnknownModel:
            refused += 1
        stop.set()
        await steady
        served = counted(server, "request_success")
    passed = refused == 2 and decision.decode == "late" and late == 1
    passed &= served == {"a": answered} and answered > 0
    said = f"first answered {answered} by its own count {served}, second {late},"
    return passed, f"{said} unknown refused {refused} times"
