"""The examples that need engines run as they are, and say what they promise."""

import asyncio
import contextlib
import json
import os
import pathlib
import re
import sys

import pytest
from tests.vllm.conftest import free_port

pytest.importorskip("vllm")
from llmd.adapters.vllm.tiny import make_model

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("models") / "tiny"))


async def run(name, *arguments, seconds=240, cwd=None):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(EXAMPLES / name), *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=cwd,
    )
    try:
        async with asyncio.timeout(seconds):
            said, complained = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, complained.decode()[-2000:]
    return said.decode()


async def test_quickstart(model):
    said = await run("quickstart.py", model)
    lines = re.findall(r"r\d on (\w), (\d+) tokens were cached", said)
    assert len({worker for worker, _ in lines}) == 1
    assert [int(cached) > 0 for _, cached in lines] == [False, True, True]
    assert "has the lowest cost" in said


async def test_demo(model):
    said = await run("demo.py", model)
    assert said.count("\nyes ") == 4
    assert "NO " not in said


async def test_disaggregated(model):
    said = await run("disaggregated.py", model)
    assert said.count("16 tokens from decode-0") == 3
    [handed] = re.findall(r"decode-0: (\d+) tokens of KV came", said)
    assert int(handed) > 0


async def test_autoscale():
    said = await run("autoscale.py")
    assert "60 requests answered" in said
    bars = re.findall(r"^ *[\d.]+ s  ([#.]*) ", said, re.MULTILINE)
    # It ends as soon as one is left, which need not be shown any more.
    assert len(bars[-1]) < max(map(len, bars))


@pytest.mark.parametrize("row", range(1, 13))
async def test_study(model, row, tmp_path):
    result = tmp_path / "study.json"
    arguments = ("--row", str(row), "--json", str(result), "--model", model)
    await run("gh200_study.py", *arguments)
    (entry,) = json.loads(result.read_text())
    assert entry["passed"] is True
    assert entry["evidence"]


@contextlib.asynccontextmanager
async def vllm_server(model):
    """Start vLLM's own OpenAI server on a free port."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--block-size", "32", "--max-num-seqs", "16"),
        *("--max-model-len", "1024", "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(16 << 20)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            async with asyncio.timeout(30):
                await process.wait()
        except TimeoutError:
            process.kill()


async def healthy(http, url, seconds=120):
    import httpx

    async with asyncio.timeout(seconds):
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await http.get(f"{url}/health")).status_code == 200:
                    return
            await asyncio.sleep(0.2)


async def test_custom_server(model, monkeypatch):
    import httpx

    monkeypatch.syspath_prepend(str(EXAMPLES))
    from custom_server import make_app

    async with vllm_server(model) as url, httpx.AsyncClient(timeout=30) as http:
        await healthy(http, url)
        app = make_app([url])
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as c:
                good = await c.post("/ask", json={"prompt": [5, 6, 7]})
                assert good.json()["worker"] == url
                assert good.json()["text"]
                assert (await c.post("/ask", json={"prompt": []})).status_code == 400
                assert (await c.post("/ask", content=b"{")).status_code == 400
            workers = app.state.server.cluster.view.workers
            assert workers.running_requests.sum() == 0


async def test_calibrate(model, tmp_path):
    said = await run("calibrate.py", model, cwd=tmp_path)
    assert "us a token" in said
    compared = len(re.findall(r"p50 +[\d.]+ +[\d.]+", said))
    assert compared == 3 or "nothing was measured" in said
    assert (tmp_path / "calibration.json").exists()
