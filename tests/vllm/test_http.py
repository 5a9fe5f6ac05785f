"""Unchanged clients against the edge: the openai package, vLLM's benchmark."""

import asyncio
import contextlib
import json
import socket
import sys

import pytest

pytest.importorskip("vllm")
import openai
import uvicorn

import llmd
from llmd.adapters.openai_http import create_app
from llmd.adapters.vllm.engine import VllmEngine
from llmd.adapters.vllm.tiny import make_model
from llmd.live import Server

# `vllm bench serve`; the console script wants a distribution named vllm.
BENCH_SERVE = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
OPTIONS = {"max_model_len": 1024, "kv_cache_memory_bytes": 16 << 20}


@contextlib.asynccontextmanager
async def served(server):
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(server), log_level="error", ws="none")
    http = uvicorn.Server(config)
    task = asyncio.create_task(http.serve([listening]))
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        http.should_exit = True
        await task
        listening.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
async def url(model):
    async with Server(llmd.Cluster(router=llmd.LeastWork())) as server:
        for worker in ("a", "b"):
            engine = VllmEngine(model, names=("tiny",), options=OPTIONS)
            await server.add(engine, worker)
        async with served(server) as url:
            yield url


@pytest.fixture(scope="module")
async def client(url):
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


ASKED = {"model": "tiny", "max_tokens": 12, "temperature": 0}


async def test_completions_streamed_and_not(client):
    whole = await client.completions.create(prompt="Hello " * 40, **ASKED)
    assert whole.usage.completion_tokens > 0
    stream = await client.completions.create(
        prompt="Hello " * 40,
        stream=True,
        stream_options={"include_usage": True},
        **ASKED,
    )
    pieces = [piece async for piece in stream]
    text = "".join(p.choices[0].text for p in pieces if p.choices)
    assert text == whole.choices[0].text
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    # The second time, the engine found the prompt in its cache.
    assert pieces[-1].usage.prompt_tokens_details.cached_tokens > 0


async def test_token_ids_and_logprobs(client):
    answer = await client.completions.create(
        prompt=[[5, 6, 7], [8, 9]], logprobs=2, **ASKED
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs)
        assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs)
        assert all(len(top) >= 2 for top in choice.logprobs.top_logprobs)


async def test_chat_uses_the_models_own_template(client, model):
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "Who are you?"}]
    answer = await client.chat.completions.create(
        messages=messages, logprobs=True, top_logprobs=2, **ASKED
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert answer.usage.prompt_tokens == len(ids)
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    same = await client.completions.create(prompt=list(ids), **ASKED)
    assert same.choices[0].text == answer.choices[0].message.content
    stream = await client.chat.completions.create(
        messages=messages, stream=True, **ASKED
    )
    pieces = [piece async for piece in stream]
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == answer.choices[0].message.content


async def test_errors_reach_the_client_as_its_own_types(client):
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(prompt="a", **{**ASKED, "model": "other"})
    with pytest.raises(openai.BadRequestError, match="takes 1024"):
        await client.completions.create(prompt="a" * 2000, **ASKED)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await client.completions.create(prompt="a", **{**ASKED, "temperature": -1})


async def test_a_client_that_goes_away_frees_its_place(client, url):
    import httpx

    stream = await client.completions.create(
        prompt="a", stream=True, **{**ASKED, "max_tokens": 900}
    )
    await anext(aiter(stream))
    await stream.close()
    async with httpx.AsyncClient() as http, asyncio.timeout(10):
        while True:
            text = (await http.get(f"{url}/metrics")).text
            if 'running_requests{model_name="tiny"} 0.0' in text:
                break
            await asyncio.sleep(0.05)
    assert 'outcome="cancelled"' in text


async def test_models_are_listed(client):
    assert [model.id async for model in await client.models.list()] == ["tiny"]


async def test_vllms_own_benchmark_client(url, model, tmp_path):
    result = tmp_path / "result.json"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", BENCH_SERVE),
        *("--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions"),
        *("--model", "tiny", "--tokenizer", model, "--dataset-name", "random"),
        *("--random-input-len", "64", "--random-output-len", "8"),
        *("--num-prompts", "12", "--request-rate", "20", "--disable-tqdm"),
        *("--save-result", "--result-filename", str(result)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(120):
        said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()[-2000:]
    measured = json.loads(result.read_text())
    assert measured["completed"] == 12
    assert measured["total_output_tokens"] == 12 * 8
