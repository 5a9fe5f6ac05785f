"""The ASGI application: routes, errors and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import math
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import attrs
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ...live import Server
from ...types import Request
from ..prometheus import ServerCollector
from . import answers, faults, wire
from .names import Names
from .observe import Observer
from .prompts import Tokenizers

T = TypeVar("T")

_log = logging.getLogger("llmd.http")
_CLIENT_GONE = 499  # as nginx logs it; nobody reads it
_DEFAULT_COMPLETION_TOKENS = 16  # of the OpenAI API


def create_app(
    server: Server, *, pool: str = "llmd", max_body_bytes: int = 16 << 20
) -> Starlette:
    """Return the OpenAI-compatible application of *server*.

    The server is the caller's to enter and to close.

    Args:
        server: Answers.
        pool: Label of the pool metrics.
        max_body_bytes: Larger bodies are refused with 413.
    """
    names = Names(server)
    edge = _Edge(server, max_body_bytes, names, Tokenizers(names), Observer(names))
    edge.observer.registry.register(ServerCollector(server, pool))
    return Starlette(
        routes=[
            Route("/v1/completions", edge.completions, methods=["POST"]),
            Route("/v1/chat/completions", edge.chat, methods=["POST"]),
            Route("/v1/models", edge.models),
            Route("/v1/models/", edge.models),
            # Names of models may have slashes.
            Route("/v1/models/{name:path}", edge.model),
            Route("/health", edge.health),
            Route("/metrics", edge.metrics),
        ],
        exception_handlers={HTTPException: _no_such_path},
    )


_Endpoint = Callable[["_Edge", HttpRequest], Awaitable[Response]]


def _answering_errors(endpoint: _Endpoint) -> _Endpoint:
    @functools.wraps(endpoint)
    async def answered(edge: _Edge, http: HttpRequest) -> Response:
        try:
            return await endpoint(edge, http)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)
        except Exception as error:
            return _error_response(faults.first(error))

    return answered


@attrs.define(eq=False)
class _Edge:
    server: Server
    max_body_bytes: int
    names: Names
    tokenizers: Tokenizers
    observer: Observer

    @_answering_errors
    async def completions(self, http: HttpRequest) -> Response:
        body = await wire.read(http, self.max_body_bytes)
        ask = wire.ask(http, body, _DEFAULT_COMPLETION_TOKENS)
        prompts = [
            await _while_connected(http, self.tokenizers.text(ask, prompt))
            if isinstance(prompt, str)
            else prompt
            for prompt in wire.prompts_of(body)
        ]
        return await self._answer(http, ask, prompts, chat=False)

    @_answering_errors
    async def chat(self, http: HttpRequest) -> Response:
        body = await wire.read(http, self.max_body_bytes)
        ask = wire.ask(http, body, None)
        messages = wire.messages_of(body)
        reading = self.tokenizers.chat(ask, messages)
        prompt = await _while_connected(http, reading)
        return await self._answer(http, ask, [prompt], chat=True)

    @_answering_errors
    async def models(self, http: HttpRequest) -> Response:
        cards = [wire.card(name) for name in self.names.listed()]
        return JSONResponse({"object": "list", "data": cards})

    @_answering_errors
    async def model(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        if name not in self.names.listed():
            raise self.names.unknown(name)
        return JSONResponse(wire.card(name))

    @_answering_errors
    async def health(self, http: HttpRequest) -> Response:
        ready = int(self.server.cluster.view.workers.ready().sum())
        return JSONResponse({"ready_workers": ready}, 200 if ready else 503)

    @_answering_errors
    async def metrics(self, http: HttpRequest) -> Response:
        text = generate_latest(self.observer.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def _answer(
        self, http: HttpRequest, ask: wire.Ask, prompts: Sequence[Any], chat: bool
    ) -> Response:
        choices = self._choices(ask, prompts, chat)
        if not ask.stream:
            work = answers.in_full(self.server, choices, ask, self.observer)
            return JSONResponse(await _while_connected(http, work))
        pieces = answers.in_pieces(self.server, choices, ask, self.observer)
        # The first piece tells whether there is an answer: until then an error
        # still has a status of its own.
        opening = 1 + len(choices) if chat else 1
        ahead = await _while_connected(http, _take(pieces, opening))
        return StreamingResponse(_events(ahead, pieces), media_type="text/event-stream")

    def _choices(
        self, ask: wire.Ask, prompts: Sequence[Any], chat: bool
    ) -> list[answers.Answer]:
        call = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        now = self.server.clock()
        model, lora = self.names.resolve(ask.model)
        made = []
        for index in range(len(prompts) * ask.choices):
            request = Request(
                id=f"{call}-{index}",
                prompt=prompts[index // ask.choices],
                arrived_at=now,
                max_new_tokens=ask.max_new_tokens,
                model=model,
                lora=lora,
                salt=ask.salt,
                tenant=ask.tenant,
                session=ask.session,
                priority=ask.priority,
                sheddable=ask.sheddable,
                resumable=ask.resumable,
                deadline=now + ask.timeout if ask.timeout < math.inf else math.inf,
            )
            made.append(answers.Answer(request=request, index=index, chat=chat))
        return made


async def _no_such_path(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = faults.body_of_status(error.status_code, http.url.path)
    return JSONResponse(body, error.status_code, headers=error.headers)


def _error_response(error: Exception) -> JSONResponse:
    headers = faults.retry_after(error)
    return JSONResponse(_told(error), faults.status_of(error), headers=headers)


def _told(error: Exception) -> dict[str, Any]:
    """Return what the client is told of *error*; tell the log what only it may."""
    if faults.is_ours(error):
        _log.error("an endpoint failed", exc_info=error)
    return faults.body_of(error)


async def _while_connected(http: HttpRequest, work: Awaitable[T]) -> T:
    """Await *work*, or cancel it as soon as the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _take(
    pieces: AsyncGenerator[dict[str, Any], None], count: int
) -> list[dict[str, Any]]:
    """Return the first *count* pieces, closing the rest if that fails."""
    taken: list[dict[str, Any]] = []
    try:
        while len(taken) < count:
            taken.append(await anext(pieces))
    except StopAsyncIteration:
        pass
    except BaseException:
        await pieces.aclose()
        raise
    return taken


async def _events(
    ahead: Sequence[dict[str, Any]], pieces: AsyncGenerator[dict[str, Any], None]
) -> AsyncGenerator[str, None]:
    """Yield server-sent events; an error in mid-stream is the last one."""
    async with contextlib.aclosing(pieces):
        for piece in ahead:
            yield _event(piece)
        try:
            async for piece in pieces:
                yield _event(piece)
        except Exception as error:
            yield _event(_told(faults.first(error)))
            return
        yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
