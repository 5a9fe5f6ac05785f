"""A vLLM server that somebody else runs, by URL."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import attrs
import httpx

from ...errors import EngineError, WorkerLost
from ...events import SignalsReported
from ...live.engine import Call, Engine, Output, Report
from ...types import RequestId, State, Worker, WorkerId
from . import completions
from .kv_events import KVEventDecoder
from .kv_stream import KVEndpoint, KVEventStream
from .metrics import EngineMetrics, combined
from .server import AbortedError, Read, Server


class RemoteEngine(Engine):
    """Talks to vLLM's OpenAI server; starts and stops nothing there.

    Its `/metrics` are read and its `/health` is asked once in *every* seconds.
    The server tells how many prompt tokens it found in its cache only if it
    runs with `--enable-prompt-tokens-details`.

    Args:
        url: Where it is, without `/v1`.
        kv_endpoints: Where it publishes KV events, one for each rank; without
            any, nothing is known of its cache.
        decoder: Knows already what it holds, from another process's dump, to go
            with an index restored from there.
        max_running: Requests it batches at once (`--max-num-seqs`); it does not
            tell.
        priorities: It schedules by priority; others refuse requests with one.
        api_key: Sent as bearer token.
        every: Seconds between two looks at its metrics and its health.
        failures: Health checks in a row that may fail before it counts as dead.
        start_timeout: Seconds to wait for it to come up.
        token_timeout: Seconds that an answer may stand still, queue included.

    >>> RemoteEngine("http://localhost:8000/").url
    'http://localhost:8000'
    """

    def __init__(
        self,
        url: str,
        *,
        kv_endpoints: Sequence[KVEndpoint] = (),
        decoder: KVEventDecoder | None = None,
        max_running: int = 256,
        priorities: bool = False,
        api_key: str = "",
        every: float = 1.0,
        failures: int = 3,
        start_timeout: float = 120.0,
        token_timeout: float = 600.0,
    ) -> None:
        self.url = url.rstrip("/")
        self.decoder = decoder
        self._kv_endpoints = tuple(kv_endpoints)
        self._max_running = max_running
        self._priorities = priorities
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._every = every
        self._failures = failures
        self._start_timeout = start_timeout
        self._token_timeout = token_timeout
        self._server: Server | None = None
        self._reads: dict[RequestId, Read] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._streams: list[KVEventStream] = []
        self._death: asyncio.Future[str] | None = None

    @property
    def metrics(self) -> Mapping[str, EngineMetrics]:
        """What each of its engines told at the last look, by vLLM's label."""
        return self._server.metrics if self._server is not None else {}

    async def start(
        self,
        worker: WorkerId,
        report: Callable[[Report], None],
        progress: Callable[[State], None],
    ) -> Worker:
        if self._death is not None:
            raise EngineError(f"{self.url} was started before")
        self._death = asyncio.get_running_loop().create_future()
        self._server = server = Server(self.url, self._headers)
        try:
            progress(State.LOADING)
            async with asyncio.timeout(self._start_timeout):
                await server.up(min(self._every, 0.5))
            progress(State.WARMING)
            await server.probe(self._start_timeout)
        except BaseException as error:
            await self.stop()
            if isinstance(error, TimeoutError | httpx.HTTPError):
                raise EngineError(f"{self.url} did not come up: {error!r}") from error
            raise
        self._listen(server, worker, report)
        return self._described(server, worker)

    async def generate(self, call: Call) -> AsyncIterator[Output]:
        server, request = self._alive(), call.request
        body = completions.body(
            call,
            request.lora or request.model or server.served.model,
            server.served.max_model_tokens,
            priorities=self._priorities,
        )
        read = self._reads[request.id] = Read(self._token_timeout)
        try:
            async with contextlib.aclosing(server.complete(body, read)) as pieces:
                async for piece in pieces:
                    yield piece
        except AbortedError:
            yield Output(finish_reason="abort")
        except httpx.HTTPError as error:
            raise WorkerLost(f"{self.url}: {error!r}") from error
        finally:
            self._reads.pop(request.id, None)

    async def abort(self, request_id: RequestId) -> None:
        # The server aborts what nobody listens to any more.
        if read := self._reads.get(request_id):
            read.abort()

    async def stop(self) -> None:
        await self._end_reads(AbortedError())
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        streams, self._streams = self._streams, []
        for stream in streams:
            await stream.close()
        server, self._server = self._server, None
        if server is not None:
            await server.close()

    async def died(self) -> str:
        if self._death is None:
            raise EngineError(f"{self.url} is not started")
        return await asyncio.shield(self._death)

    async def tokenize(self, text: str) -> list[int]:
        return await self._tokens({"prompt": text})

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> list[int]:
        asked: dict[str, Any] = {"messages": list(messages)}
        if tools:
            asked["tools"] = list(tools)
        if template:
            asked["chat_template_kwargs"] = dict(template)
        return await self._tokens(asked)

    async def _tokens(self, asked: dict[str, Any]) -> list[int]:
        server = self._alive()
        question = {"model": server.served.model, **asked}
        try:
            answer = await server.ask("POST", "/tokenize", question)
        except httpx.HTTPError as error:
            raise EngineError(f"{self.url}: {error!r}") from error
        tokens: list[int] = answer["tokens"]
        return tokens

    def _listen(
        self, server: Server, worker: WorkerId, report: Callable[[Report], None]
    ) -> None:
        if self.decoder is None:
            self.decoder = KVEventDecoder(worker)
        self.decoder.worker = worker
        for endpoint in self._kv_endpoints:
            stream = KVEventStream(self.decoder, report, endpoint)
            stream.start()
            self._streams.append(stream)
        for watch in (
            self._watch_metrics(server, worker, report),
            self._watch_health(server),
        ):
            self._tasks.append(asyncio.create_task(watch, name="llmd-vllm-remote"))

    async def _watch_metrics(
        self, server: Server, worker: WorkerId, report: Callable[[Report], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if await server.look():
                    signals = combined(server.metrics)
                    at = server.metrics_at
                    report(SignalsReported(loop.time(), worker, signals, at))
            await asyncio.sleep(self._every)

    async def _watch_health(self, server: Server) -> None:
        failed = 0
        while failed < self._failures:
            await asyncio.sleep(self._every)
            failed = 0 if await server.healthy() else failed + 1
        reason = f"{self.url}/health failed {failed} times in a row"
        if self._death is not None and not self._death.done():
            self._death.set_result(reason)
        await self._end_reads(WorkerLost(reason))

    async def _end_reads(self, reason: Exception) -> None:
        for read in self._reads.values():
            read.abort(reason)
        for _ in range(20):
            if any(read.waiting for read in self._reads.values()):
                await asyncio.sleep(0.01)

    def _described(self, server: Server, worker: WorkerId) -> Worker:
        engines, served = server.metrics.values(), server.served
        described = Worker(
            id=worker,
            models=served.models,
            loras=served.loras,
            max_running=self._max_running,
        )
        told = {
            "block_tokens": max((e.block_tokens for e in engines), default=0),
            "kv_blocks": sum(e.kv_blocks for e in engines),
            "max_model_tokens": served.max_model_tokens,
        }
        known: dict[str, Any] = {name: value for name, value in told.items() if value}
        return attrs.evolve(described, **known)

    def _alive(self) -> Server:
        if self._death is not None and self._death.done():
            raise WorkerLost(self._death.result())
        if self._server is None:
            raise EngineError(f"{self.url} is not started, or stopped")
        return self._server
