"""examples/custom_server.py over a server that speaks as vLLM's does."""

import pathlib

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


async def complete(http):
    body = await http.json()
    if max(body["prompt"]) > 1000:
        error = {"message": "Token id 99999999 is out of vocabulary", "code": 400}
        return JSONResponse({"error": error}, 400)
    if max(body["prompt"]) == 1000:
        return PlainTextResponse("oh no", 500)
    return JSONResponse({"choices": [{"text": "yes"}]})


async def models(http):
    return JSONResponse({"data": [{"id": "m", "max_model_len": 100}]})


async def nothing(http):
    return PlainTextResponse("")


PRETENDS = Starlette(
    routes=[
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", nothing),
        Route("/metrics", nothing),
    ]
)


@pytest.mark.parametrize(
    ("prompt", "status", "says"),
    [
        ([5, 6], 200, "yes"),
        ([99999999], 400, "out of vocabulary"),
        ([1000], 502, "oh no"),
        ([], 400, "at least one token"),
        ([5] * 1000, 400, "takes 100"),
    ],
)
async def test_refusals_are_passed_on(monkeypatch, over_socket, prompt, status, says):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from custom_server import make_app

    async with over_socket(PRETENDS) as url:
        app = make_app([url])
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as c:
                answer = await c.post("/ask", json={"prompt": prompt})
            assert answer.status_code == status, answer.text
            assert says in answer.text
            workers = app.state.server.cluster.view.workers
            assert workers.running_requests.sum() == 0
