"""One vLLM server over HTTP; every wait has a deadline."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

import attrs
import httpx

from ...errors import EngineError, WorkerLost
from ...live.engine import Output
from . import completions
from .metrics import EngineMetrics, read_metrics

_ASK_TIMEOUT = 10.0
_CONNECTIONS = 4096


@attrs.frozen
class Served:
    """What `/v1/models` tells: models, and adapters as models with a parent."""

    model: str = ""
    models: frozenset[str] = frozenset()
    loras: frozenset[str] = frozenset()
    max_model_tokens: int = 0

    @classmethod
    def of(cls, answer: Any) -> Served:
        """Read the answer of `/v1/models`.

        Raises:
            EngineError: It makes no sense.
        """
        try:
            cards = answer["data"]
            models = [card["id"] for card in cards if not card.get("parent")]
            loras = [card["id"] for card in cards if card.get("parent")]
            longest = [card.get("max_model_len") or 0 for card in cards]
            return cls(models[0], frozenset(models), frozenset(loras), max(longest))
        except (LookupError, TypeError, AttributeError) as error:
            raise EngineError(f"/v1/models makes no sense: {answer!r}") from error


class AbortedError(Exception):
    """A read was aborted from outside."""


class Read:
    """Waits for the pieces of one answer, each with a deadline, until aborted."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._scope: asyncio.Timeout | None = None
        self._reason: Exception | None = None

    @property
    def waiting(self) -> bool:
        """Whether somebody waits for a piece now."""
        return self._scope is not None

    def abort(self, reason: Exception | None = None) -> None:
        """End the wait, and any later one, with *reason*."""
        self._reason = self._reason or reason or AbortedError()
        if self._scope is not None:
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def wait(self, step: Callable[[], Awaitable[Any]]) -> Any:
        """Return what *step* gives.

        Raises:
            AbortedError: `abort` was called without a reason.
            EngineError: It takes too long.
        """
        if self._reason is not None:
            raise self._reason
        try:
            async with asyncio.timeout(self._seconds) as self._scope:
                return await step()
        except TimeoutError:
            if self._reason is not None:
                raise self._reason from None
            raise EngineError(f"no token for {self._seconds} s") from None
        finally:
            self._scope = None


class Server:
    """Asks one server.  All but `healthy` raise `httpx.HTTPError` if it is not there.

    Attributes:
        served: Its models, once asked.
        metrics: Of each of its engines, at the last look.
        metrics_at: When that was, on the loop's clock; 0 before the first.
    """

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self.served = Served()
        self.metrics: Mapping[str, EngineMetrics] = {}
        self.metrics_at = 0.0
        self._client = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=_ASK_TIMEOUT,
            limits=httpx.Limits(max_connections=_CONNECTIONS),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def ask(
        self, method: str, path: str, body: Any = None, seconds: float = _ASK_TIMEOUT
    ) -> Any:
        """Return the JSON that it answers.

        Raises:
            LlmdError: It answers with an error.
        """
        response = await self._client.request(method, path, json=body, timeout=seconds)
        if response.status_code != httpx.codes.OK:
            raise completions.refusal(response.status_code, response.text)
        return response.json()

    async def healthy(self) -> bool:
        """Say whether it answers that all is well."""
        try:
            response = await self._client.get("/health")
        except httpx.HTTPError:
            return False
        return response.status_code == httpx.codes.OK

    async def up(self, every: float) -> None:
        """Wait until it is healthy, and learn what it serves."""
        while not await self.healthy():  # noqa: ASYNC110
            await asyncio.sleep(every)
        self.served = Served.of(await self.ask("GET", "/v1/models"))
        await self.look()

    async def look(self) -> bool:
        """Read `/metrics`; return whether that worked."""
        response = await self._client.get("/metrics")
        with contextlib.suppress(ValueError):
            self.metrics = read_metrics(response.text)
            self.metrics_at = asyncio.get_running_loop().time()
            return True
        return False

    async def probe(self, seconds: float) -> None:
        """Have it compute a token; a prompt below a block leaves no trace."""
        body = {"model": self.served.model, "prompt": [7], "max_tokens": 1}
        await self.ask("POST", "/v1/completions", body, seconds)

    async def complete(
        self, body: Mapping[str, Any], read: Read
    ) -> AsyncGenerator[Output, None]:
        """Yield the pieces of one completion.

        Raises:
            InvalidRequest: The server refuses it.
            EngineError: It fails, or is silent too long.
            WorkerLost: The answer breaks off.
        """
        asked = self._client.build_request(
            "POST",
            "/v1/completions",
            json=body,
            timeout=httpx.Timeout(_ASK_TIMEOUT, read=None, pool=None),
        )
        response = await read.wait(lambda: self._client.send(asked, stream=True))
        try:
            if response.status_code != httpx.codes.OK:
                text = (await read.wait(response.aread)).decode(errors="replace")
                raise completions.refusal(response.status_code, text)
            if not body["stream"]:
                yield completions.whole(await read.wait(response.aread))
                return
            lines = response.aiter_lines()
            chunks = completions.Chunks()
            while (line := await read.wait(lambda: anext(lines, None))) is not None:
                for piece in chunks.take(line):
                    yield piece
                if chunks.done:
                    return
            raise WorkerLost("the answer broke off")
        finally:
            await response.aclose()
