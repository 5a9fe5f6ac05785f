"""A web server of one's own around a lease: llmd decides, the server calls.

The engines here are two vLLM servers that somebody else runs; nothing of llmd
is between them and this code but the decision.  Try it:

    python examples/custom_server.py http://127.0.0.1:8001 http://127.0.0.1:8002
    curl -d '{"prompt": [5, 6, 7]}' http://127.0.0.1:8000/ask
"""

import contextlib
import itertools
import json
import sys

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

import llmd
from llmd.adapters.vllm.remote import RemoteEngine
from llmd.live import Server

_names = (f"ask-{number}" for number in itertools.count())


def asked(body: dict, tenant: str) -> llmd.Request:
    return llmd.Request(
        id=next(_names),
        prompt=body["prompt"],
        max_new_tokens=body.get("max_tokens", 16),
        tenant=tenant,
    )


def make_app(urls: list[str]) -> Starlette:
    @contextlib.asynccontextmanager
    async def lifespan(app):
        cluster = llmd.Cluster(router=llmd.LeastWork(), index=llmd.GuessedIndex())
        async with Server(cluster) as server, httpx.AsyncClient(timeout=60) as client:
            for url in urls:
                await server.add(RemoteEngine(url), worker=url)
            app.state.server, app.state.client = server, client
            yield

    async def ask(http):
        server, client = http.app.state.server, http.app.state.client
        try:
            body = json.loads(await http.body())
            request = asked(body, http.headers.get("x-tenant", ""))
            # The load is booked from here to the end of the block, and released
            # however the block is left: answer, error, timeout or a client gone.
            async with server.lease(request) as lease:
                answer = await client.post(
                    f"{lease.worker}/v1/completions",
                    json={
                        "prompt": body["prompt"],
                        "max_tokens": request.max_new_tokens,
                        "temperature": 0,
                    },
                )
                answer.raise_for_status()
                lease.first_token()
        except (KeyError, TypeError, ValueError) as error:
            return JSONResponse({"error": str(error)}, 400)
        except llmd.errors.Rejected as error:
            return JSONResponse({"error": error.reason}, 429)
        except httpx.HTTPStatusError as error:
            # What the engine refuses is the client's mistake; the rest is not.
            refused = error.response.status_code in (400, 404, 422)
            return JSONResponse({"error": error.response.text}, 400 if refused else 502)
        text = answer.json()["choices"][0]["text"]
        return JSONResponse({"text": text, "worker": lease.worker})

    return Starlette(routes=[Route("/ask", ask, methods=["POST"])], lifespan=lifespan)


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[1:]), host="127.0.0.1", port=8000)
