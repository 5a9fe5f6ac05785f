"""Rows 8 to 12: selective P/D, KV transfer, MIG, precise routing with P/D, 2+2."""

import asyncio
import contextlib
import random
import secrets

import llmd
from llmd.adapters.vllm.connector_config import transfer_config
from llmd.adapters.vllm.engine import VllmEngine
from llmd.errors import NoWay
from llmd.live import Call, Server
from llmd.machines import Answers, detect
from llmd.transport import Place, Way, choose_way

from .row import GREEDY, OPTIONS, ask, counted, prefix

THRESHOLD = 16
LONG = {**OPTIONS, "max_model_len": 2048}


@contextlib.asynccontextmanager
async def pairs(model, router, prefill=1, decode=1):
    """Start prefill engines p0, ... and decode engines d0, ... behind a server."""
    environment = {"LLMD_KV_KEY": secrets.token_hex(32)}
    async with Server(llmd.Cluster(router=router)) as server:
        for role, letter, count in (
            ("kv_producer", "p", prefill),
            ("kv_consumer", "d", decode),
        ):
            for number in range(count):
                config = transfer_config(role=role, staging_bytes=32 << 20)
                options = {**LONG, "kv_transfer_config": config}
                engine = VllmEngine(model, options=options, environment=environment)
                await server.add(engine, f"{letter}{number}")
        yield server


async def alone(server, worker, prompt, new=8):
    """Return the tokens that one engine gives to a prompt, with no hand-off."""
    id = f"alone-{secrets.token_hex(4)}"
    request = llmd.Request(id=id, prompt=prompt, max_new_tokens=new)
    call = Call(request=request, sampling=GREEDY)
    outputs = [piece async for piece in server.engine(worker).generate(call)]
    return [token for piece in outputs for token in piece.token_ids]


async def selective_pd(model):
    router = llmd.Disaggregated(min_uncached_tokens=THRESHOLD)
    async with pairs(model, router) as server:
        *_, short = await ask(server, "short", prefix(1, THRESHOLD - 1))
        *_, long = await ask(server, "long", prefix(2, 300))
        *_, again = await ask(server, "again", [*prefix(2, 300)[:288], 9, 8, 7])
        handed = counted(server, "external_prefix_cache_hits")["d0"]
    passed = short.prefill is None and long.prefill == "p0" and again.prefill is None
    passed &= handed == 299
    return passed, f"{short.notes[-1]}; {long.notes[-1]}; {again.notes[-1]}"


async def kv_transfer(model):
    rng = random.Random(0)
    lengths = [20, 33, 64, 1500, *(rng.randrange(20, 1500) for _ in range(46))]
    router = llmd.Disaggregated(min_uncached_tokens=THRESHOLD)
    same = 0
    async with pairs(model, router) as server:
        for number, length in enumerate(lengths):
            prompt = [rng.randrange(4, 500) for _ in range(length)]
            tokens, *_ = await ask(server, f"r{number}", prompt)
            same += tokens == await alone(server, "p0", prompt)
        hits = counted(server, "external_prefix_cache_hits")["d0"]
        queries = counted(server, "external_prefix_cache_queries")["d0"]
    passed = same == len(lengths) and hits == sum(lengths) - len(lengths)
    said = f"{same} of {len(lengths)} answers identical to one engine's"
    return passed, f"{said}; external hits {hits} of {queries} tokens"


async def mig_instances(model):
    def instance(name):
        answers = Answers(
            name="NVIDIA GH200 480GB",
            uuid=name,
            memory_bytes=11_811_160_064,
            compute_capability=(9, 0),
            c2c=True,
            mig=True,
            mig_instance=True,
            parent_uuid="GPU-0",
        )
        return Place(host="gh200", device=detect(answers))

    one, other = instance("MIG-1"), instance("MIG-2")
    choice = choose_way(one, other)
    try:
        choose_way(one, other, allow_host=False)
        refused = ""
    except NoWay as error:
        refused = str(error)
    passed = choice.way is Way.HOST and "MIG" in choice.reasons[0] and "MIG" in refused
    return passed, f"{choice.way.value}, as {choice.reasons[0]}"


async def precise_and_pd(model):
    blend = 3 * llmd.PrefixOverlap() + 2 * llmd.KVHeadroom() + 2 * llmd.QueueDepth()
    router = llmd.Disaggregated(
        prefill=blend, decode=blend, min_uncached_tokens=THRESHOLD
    )
    async with pairs(model, router) as server:
        system = prefix(3, 256)
        await ask(server, "first", [*system, *prefix(4, 40)])
        await asyncio.sleep(1.5)  # from now on only what events said counts
        prompt = [*system, *prefix(5, 100)]
        tokens, _, decision = await ask(server, "second", prompt)
        wanted = await alone(server, "p0", prompt)
        hits = counted(server, "prefix_cache_hits")
    score = decision.terms[0].raw[0]
    other = decision.prefill_decision.terms[0].raw[0]
    passed = decision.prefill == "p0" and score > 0.6 and other > 0.6
    passed &= tokens == wanted and hits["p0"] >= 256 and hits["d0"] >= 256
    said = f"prefix score {score:.2f} for decode and {other:.2f} for prefill"
    return passed, f"{said}; {decision.notes[-1]}; hits {hits}"


async def two_and_two(model):
    router = llmd.Disaggregated(min_uncached_tokens=THRESHOLD)
    prompts = [prefix(20 + number, 200 + 40 * number) for number in range(16)]
    async with pairs(model, router, 2, 2) as server:
        answers = await asyncio.gather(
            *(ask(server, f"r{n}", prompt, new=24) for n, prompt in enumerate(prompts))
        )
        computed = counted(server, "prompt_tokens")
        generated = counted(server, "generation_tokens")
        handed = counted(server, "external_prefix_cache_hits")
        same = 0
        for (tokens, *_), prompt in zip(answers, prompts, strict=True):
            same += tokens == await alone(server, "p0", prompt, new=24)
    passed = same == len(prompts) and min(handed["d0"], handed["d1"]) > 0
    passed &= min(computed["p0"], computed["p1"]) > 0
    said = f"prompt tokens {computed}, generated {generated}, handed over {handed}"
    return passed, f"{same} of {len(prompts)} identical; {said}"
