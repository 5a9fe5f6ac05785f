"""A real server, of whom only the URL and the KV event endpoints are known."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys

import httpx
import numpy as np
import pytest
from tests.vllm.conftest import (
    BLOCK_TOKENS,
    GREEDY,
    Running,
    free_port,
    prompt,
    request,
    text_of,
    tokens_of,
)

from llmd.adapters.vllm.kv_stream import KVEndpoint
from llmd.adapters.vllm.remote import RemoteEngine
from llmd.errors import InvalidRequest, PromptTooLong, UnknownModel, WorkerLost
from llmd.events import BlocksStored, SignalsReported
from llmd.live.engine import Call
from llmd.types import State


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    """Run vLLM's own server; give its process, URL and event endpoint."""
    scratch = tmp_path_factory.mktemp("server")
    port = free_port()
    endpoint = KVEndpoint(f"ipc://{scratch}/kv", f"ipc://{scratch}/replay", "kv@one")
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": endpoint.events,
        "replay_endpoint": endpoint.replay,
        "topic": "kv@one@tiny",
    }
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(models[0]), "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--max-model-len", "1024", "--max-num-seqs", "16", "--enforce-eager",
        "--block-size", str(BLOCK_TOKENS), "--enable-prompt-tokens-details",
        "--kv-cache-memory-bytes", str(16 << 20), "--seed", "0",
        "--distributed-executor-backend", "uni", "--scheduling-policy", "priority",
        "--kv-events-config", json.dumps(events),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with open(scratch / "log", "w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process, f"http://127.0.0.1:{port}", endpoint
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)


@pytest.fixture(scope="module")
async def remote(server):
    _, url, endpoint = server
    engine = RemoteEngine(
        url,
        kv_endpoints=[endpoint],
        max_running=16,
        priorities=True,
        every=0.2,
        start_timeout=120,
    )
    try:
        yield await Running(engine).start("far")
    finally:
        await engine.stop()


async def test_it_learns_what_the_server_serves(remote):
    assert remote.states == [State.LOADING, State.WARMING]
    worker = remote.worker
    assert worker.models == {"tiny"}
    assert worker.loras == frozenset()
    assert worker.block_tokens == BLOCK_TOKENS
    assert worker.kv_blocks == (16 << 20) // (2 * 2 * 2 * 32 * 4 * BLOCK_TOKENS) - 1
    assert worker.max_model_tokens == 1024
    assert worker.max_running == 16


async def test_stream_equals_whole_answer(remote, server):
    letters = await remote.engine.tokenize("abcdefghijklmnopqrstuvwxyz")
    sampling = {**GREEDY, "allowed_token_ids": letters}
    tokens = await remote.engine.tokenize("Once upon a time")
    pieces = await remote.answer(
        request("streamed", tokens, max_new_tokens=20), sampling=sampling
    )
    assert len(pieces) > 1
    assert pieces[-1].finish_reason == "length"
    async with httpx.AsyncClient(base_url=server[1], timeout=30) as client:
        body = {**sampling, "model": "tiny", "prompt": tokens, "max_tokens": 20}
        body["return_token_ids"] = True
        answer = (await client.post("/v1/completions", json=body)).json()
    assert text_of(pieces) == answer["choices"][0]["text"]
    assert tokens_of(pieces) == answer["choices"][0]["token_ids"]


@pytest.mark.parametrize("salt", ["", "tenant-a"])
async def test_cache_hits_and_events(remote, salt):
    tokens = prompt(6 * BLOCK_TOKENS + 5, salt=1)
    cold = await remote.answer(request(f"cold{salt}", tokens, salt=salt))
    warm = await remote.answer(request(f"warm{salt}", tokens, salt=salt))
    assert cold[-1].cached_tokens == 0
    assert warm[-1].cached_tokens == 6 * BLOCK_TOKENS
    assert tokens_of(cold) == tokens_of(warm)
    expected = request("x", tokens, salt=salt).hashes(BLOCK_TOKENS)

    def all_stored(reports):
        found = [r.hashes for r in reports if isinstance(r, BlocksStored)]
        return found and np.isin(expected, np.concatenate(found)).all()

    await remote.told(all_stored)


async def test_who_comes_late_learns_what_is_held(remote, server):
    tokens = prompt(5 * BLOCK_TOKENS, salt=3)
    await remote.answer(request("before", tokens))
    late = Running(RemoteEngine(server[1], kv_endpoints=[server[2]], every=0.2))
    try:
        await late.start("late")
        expected = request("x", tokens).hashes(BLOCK_TOKENS)

        def all_stored(reports):
            found = [r.hashes for r in reports if isinstance(r, BlocksStored)]
            return found and np.isin(expected, np.concatenate(found)).all()

        await late.told(all_stored)
    finally:
        await late.engine.stop()


async def test_abort_and_closing_free_the_server(remote):
    def call(name):
        return Call(
            request=request(name, prompt(9, salt=4), max_new_tokens=900),
            sampling=GREEDY,
        )

    await remote.engine._server.look()
    before = remote.engine.metrics["0"].finished["length"]
    pieces = []
    async with asyncio.timeout(30):
        async for piece in remote.engine.generate(call("aborted")):
            pieces.append(piece)
            if len(pieces) == 3:
                await remote.engine.abort("aborted")
    assert pieces[-1].finish_reason == "abort"
    assert len(tokens_of(pieces)) < 900
    stream = remote.engine.generate(call("closed"))
    await anext(stream)
    await stream.aclose()

    closed_at = asyncio.get_running_loop().time()

    def idle(reports):
        last = reports[-1]
        return (
            isinstance(last, SignalsReported)
            and last.measured_at > closed_at
            and last.signals.running_requests == 0
        )

    await remote.told(idle)
    assert remote.engine.metrics["0"].finished["length"] == before


async def test_signals_come_from_metrics(remote):
    load = [
        remote.answer(request(f"load{k}", prompt(40, salt=9 + k), max_new_tokens=400))
        for k in range(4)
    ]
    await asyncio.gather(*load)
    signals = [r for r in remote.reports if isinstance(r, SignalsReported)]
    assert max(r.signals.running_requests for r in signals) == 4
    assert all(r.measured_at <= r.at for r in signals)
    metrics = remote.engine.metrics["0"]
    assert metrics.prefix_hits > 0
    assert metrics.finished["length"] > 4


async def test_what_the_server_refuses(remote):
    with pytest.raises(PromptTooLong):
        await remote.answer(request("long", prompt(1024)))
    with pytest.raises(InvalidRequest):
        await remote.answer(request("vocabulary", [5, 100_000]))
    with pytest.raises(InvalidRequest):
        await remote.answer(request("hot", prompt(5)), sampling={"temperature": 9.0})
    with pytest.raises(InvalidRequest):
        await remote.answer(request("typo", prompt(5)), sampling={"temp": 1.0})
    with pytest.raises(UnknownModel):
        await remote.answer(request("model", prompt(5), model="other"))


async def test_chat_template(remote):
    ids = await remote.engine.chat([{"role": "user", "content": "hi"}])
    assert ids == await remote.engine.tokenize(
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_a_server_that_is_killed_in_mid_stream(remote, server):
    death = asyncio.create_task(remote.engine.died())
    stream = remote.engine.generate(
        Call(
            request=request("cut", prompt(9, salt=5), max_new_tokens=900),
            sampling=GREEDY,
        )
    )
    await anext(stream)
    os.killpg(server[0].pid, signal.SIGKILL)
    async with asyncio.timeout(15):
        with pytest.raises(WorkerLost):
            async for _ in stream:
                pass
        assert "health failed 3 times" in await death
    with pytest.raises(WorkerLost):
        await remote.answer(request("late", prompt(5)))
