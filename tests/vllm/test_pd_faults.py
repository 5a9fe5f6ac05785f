"""P/D behind the live server while the prefill engine hangs and dies."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("nixl")
pytest.importorskip("xxhash")

sys.path.insert(0, str(Path(__file__).parent))

import pd
from pd import GREEDY, answer, asked, core, let_go, rest

import llmd
from llmd.adapters.vllm.tiny import make_model
from llmd.errors import WorkerLost
from llmd.live import Call, Server


def engine(model, role):
    return pd.engine(model, role, timeout_s=20.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny", tokenizer=False)


@pytest.fixture(scope="module")
async def server(model):
    router = llmd.Disaggregated(min_uncached_tokens=16)
    async with Server(llmd.Cluster(router=router), prefill_timeout=20.0) as server:
        await server.add(engine(model, "kv_producer"), "p0")
        await server.add(engine(model, "kv_consumer"), "d0")
        yield server


async def alone(server, request, worker="d0"):
    """Answer on a decode engine without the prefix it may hold by now."""
    salted = llmd.Request(
        id=f"alone-{request.id}",
        prompt=request.prompt,
        max_new_tokens=8,
        salt="apart",
    )
    call = Call(request=salted, sampling=GREEDY)
    pieces = [piece async for piece in server.engine(worker).generate(call)]
    return [token for piece in pieces for token in piece.token_ids]


async def test_a_prefill_engine_that_hangs_after_the_hand_off(server):
    """The decode engine notices, computes the prompt itself, and is right."""
    pid, frozen = core(server, "p0"), asyncio.Event()

    def freeze(seen):
        if isinstance(seen, llmd.events.PrefillEnded):
            os.kill(pid, signal.SIGSTOP)
            frozen.set()

    server.cluster.observer = freeze
    try:
        got = await answer(server, asked("hung", 1))
    finally:
        server.cluster.observer = None
        os.kill(pid, signal.SIGCONT)
    assert frozen.is_set()
    assert got == await alone(server, asked("hung", 1))
    # Awake again, it serves as before.
    before = server.engine("d0").counters["external_prefix_cache_hits"]
    got = await answer(server, asked("awake", 2))
    assert got == await alone(server, asked("awake", 2))
    assert server.engine("d0").counters["external_prefix_cache_hits"] == before + 699


async def test_a_prefill_engine_killed_while_it_computes_costs_no_answer(server):
    requests = [asked(f"k{n}", 10 + n, 1500) for n in range(6)]
    answers = [asyncio.create_task(answer(server, request)) for request in requests]
    await asyncio.sleep(0.15)
    os.kill(core(server, "p0"), signal.SIGKILL)
    got = await asyncio.gather(*answers)
    for request, tokens in zip(requests, got, strict=True):
        assert tokens == await alone(server, request)
    assert "p0" not in server.engines
    late = await answer(server, asked("late", 99))
    assert late == await alone(server, asked("late", 99))
    workers = server.cluster.view.workers
    assert workers.ids == ("d0",)
    assert not workers.running_requests.any()
    assert not workers.prefill_tokens.any()


async def test_a_decode_engine_killed_in_the_middle_of_a_hand_off(server, model):
    """It had asked for blocks, and none had come: another engine answers."""
    for name in ("d0", "p0"):
        if name in server.engines:
            await server.remove(name)
    await server.add(engine(model, "kv_producer"), "p1")
    await server.add(engine(model, "kv_consumer"), "d1")
    await server.add(engine(model, "kv_consumer"), "d2")
    computed, decoders = asyncio.Event(), []

    def freeze(seen):
        if isinstance(seen, llmd.commands.Dispatch):
            decoders.append(seen.decision.decode)
        elif isinstance(seen, llmd.events.PrefillEnded) and not computed.is_set():
            os.kill(core(server, "p1"), signal.SIGSTOP)
            computed.set()

    server.cluster.observer = freeze
    request = asked("middle", 41)
    answering = asyncio.create_task(answer(server, request))
    await asyncio.wait_for(computed.wait(), 30)
    await asyncio.sleep(0.5)  # the fetch is on its way to an engine that is frozen
    os.kill(core(server, decoders[0]), signal.SIGKILL)
    os.kill(core(server, "p1"), signal.SIGCONT)
    got = await answering
    server.cluster.observer = None
    first, second = decoders
    assert {first, second} == {"d1", "d2"}
    assert got == await alone(server, request, second)
    assert first not in server.engines
    for worker in ("p1", second):
        await let_go(server, worker, peers={1})
    assert not len(server.cluster.books)


async def test_a_decode_engine_killed_while_it_streams(server):
    """Its client has part of the answer: it hears why there is no more."""
    (decoder,) = set(server.engines) - {"p1"}
    stream = server.generate(asked("streamed", 42, new_tokens=1000), GREEDY)
    assert (await anext(stream)).token_ids
    os.kill(core(server, decoder), signal.SIGKILL)
    with pytest.raises(WorkerLost, match=decoder):
        await asyncio.wait_for(rest(stream), 30)
    # Nothing was open between the two: the prefill engine finds out by itself.
    await let_go(server, "p1", peers={0})
    assert not len(server.cluster.books)
    assert set(server.engines) == {"p1"}
