"""The edge over an engine that answers at once, called without a socket."""

import asyncio
import contextlib
import socket

import httpx
import pytest
import uvicorn

import llmd
from llmd.adapters.openai_http import create_app
from llmd.errors import InvalidRequest, WorkerLost
from llmd.live import Engine, Output, Server


class EchoEngine(Engine):
    """Answers with the prompt itself, a letter at a time."""

    def __init__(self, *models, loras=(), tokens=1000, pace=0.0, dies_after=None):
        self.models, self.tokens, self.pace = models, tokens, pace
        self.loras, self.dies_after = loras, dies_after
        self.open = 0
        self.tokenized = []

    async def start(self, worker, report, progress):
        return llmd.Worker(
            id=worker,
            models=self.models,
            loras=self.loras,
            max_model_tokens=self.tokens,
        )

    async def generate(self, call):
        if call.sampling.get("temperature", 0) < 0:
            raise InvalidRequest("temperature must not be negative")
        ids = call.request.prompt.ids.tolist()
        wanted = call.request.max_new_tokens or len(ids)
        self.open += 1
        try:
            for index in range(wanted):
                await asyncio.sleep(self.pace)
                if index == self.dies_after:
                    raise WorkerLost("killed")
                token = ids[index % len(ids)]
                yield Output(
                    token_ids=(token,),
                    text=chr(token),
                    finish_reason="length" if index == wanted - 1 else None,
                    cached_tokens=2 if index == 0 else None,
                )
        finally:
            self.open -= 1

    async def tokenize(self, text):
        self.tokenized.append(text)
        return list(text.encode())

    async def chat(self, messages, *, tools=None, template=None):
        self.tokenized.append((messages, tools, template))
        return list("".join(message["content"] for message in messages).encode())

    async def abort(self, request_id):
        pass

    async def stop(self):
        pass


@contextlib.asynccontextmanager
async def edge(*engines, cluster=None, **options):
    async with Server(cluster or llmd.Cluster(), tick=0.01) as server:
        for engine in engines:
            await server.add(engine)
        transport = httpx.ASGITransport(create_app(server, **options))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            http.server = server
            yield http


@contextlib.asynccontextmanager
async def listening(app):
    """Serve *app* on a port of its own; yield where."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # or who connects before uvicorn does is refused
    config = uvicorn.Config(app, log_level="error", ws="none")
    http = uvicorn.Server(config)
    task = asyncio.create_task(http.serve([listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        http.should_exit = True
        await task
        listener.close()


@pytest.fixture
def over_socket():
    return listening


@pytest.fixture
def echo():
    return EchoEngine


@pytest.fixture
def open_edge():
    return edge
