"""Run the requests of one HTTP call and put their pieces into OpenAI's words."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

import attrs

from ...live import Output, Server
from ...types import Request
from . import logprobs, wire
from .observe import Observer

_PIECES_AHEAD = 64


@attrs.define(eq=False, kw_only=True)
class Answer:
    """One choice of one call: its request and what came of it.

    Attributes:
        request: As it was sent to the server.
        index: Of the choice.
        chat: Whether it is a message rather than a text.
    """

    request: Request
    index: int
    chat: bool
    text: list[str] = attrs.field(factory=list)
    token_ids: list[int] = attrs.field(factory=list)
    logprobs: list[Any] = attrs.field(factory=list)
    finish_reason: str | None = None
    cached_tokens: int = 0

    def take(self, output: Output) -> None:
        """Add a piece."""
        self.text.append(output.text)
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or ()
        self.finish_reason = output.finish_reason or self.finish_reason
        self.cached_tokens = output.cached_tokens or self.cached_tokens

    def whole(self) -> dict[str, Any]:
        """Return the choice of an answer in full."""
        return self._choice("message", "".join(self.text), self.logprobs)

    def piece(self, output: Output) -> dict[str, Any]:
        """Return the choice of one piece of a stream."""
        choice = self._choice("delta", output.text, output.logprobs or [])
        choice["finish_reason"] = output.finish_reason
        return choice

    def opening(self) -> dict[str, Any]:
        """Return the choice that begins a streamed message."""
        delta = {"role": "assistant", "content": ""}
        return {"index": self.index, "delta": delta, "finish_reason": None}

    def _choice(self, part: str, text: str, tokens: list[Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": self.index,
            "logprobs": None,
            "finish_reason": self.finish_reason,
        }
        if self.chat:
            choice[part] = {"role": "assistant", "content": text}
            if tokens:
                choice["logprobs"] = logprobs.chat(tokens)
        else:
            choice["text"] = text
            if tokens:
                choice["logprobs"] = logprobs.completion(tokens)
        return choice


async def in_full(
    server: Server, answers: Sequence[Answer], ask: wire.Ask, observer: Observer
) -> dict[str, Any]:
    """Answer all choices and return the body."""
    async with asyncio.TaskGroup() as group:
        for answer in answers:
            group.create_task(_collect(server, answer, ask, observer))
    body = _envelope(answers, ask, "")
    body["choices"] = [answer.whole() for answer in answers]
    body["usage"] = _usage(answers, ask)
    return body


async def in_pieces(
    server: Server, answers: Sequence[Answer], ask: wire.Ask, observer: Observer
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the bodies of a stream."""
    head = _envelope(answers, ask, ".chunk")
    if answers[0].chat:
        for answer in answers:
            yield {**head, "choices": [answer.opening()]}
    async with contextlib.aclosing(_merged(server, answers, ask, observer)) as pieces:
        async for answer, output in pieces:
            yield {**head, "choices": [answer.piece(output)]}
    if ask.include_usage:
        yield {**head, "choices": [], "usage": _usage(answers, ask)}


async def _collect(
    server: Server, answer: Answer, ask: wire.Ask, observer: Observer
) -> None:
    async for _ in _observed(server, answer, ask.sampling, observer):
        pass


async def _observed(
    server: Server, answer: Answer, sampling: Mapping[str, Any], observer: Observer
) -> AsyncGenerator[Output, None]:
    """Yield a request's pieces, taken in and measured."""
    with observer.request(answer.request) as seen:
        outputs = server.generate(answer.request, sampling)
        async with contextlib.aclosing(outputs) as pieces:
            async for output in pieces:
                answer.take(output)
                seen(output)
                yield output


async def _merged(
    server: Server, answers: Sequence[Answer], ask: wire.Ask, observer: Observer
) -> AsyncGenerator[tuple[Answer, Output], None]:
    """Yield the pieces of all answers as they come."""
    if len(answers) == 1:
        only = _observed(server, answers[0], ask.sampling, observer)
        async with contextlib.aclosing(only) as outputs:
            async for output in outputs:
                yield answers[0], output
        return
    queue: asyncio.Queue[tuple[Answer, Output] | None] = asyncio.Queue(_PIECES_AHEAD)

    async def feed(answer: Answer) -> None:
        async for output in _observed(server, answer, ask.sampling, observer):
            await queue.put((answer, output))

    async def feed_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for answer in answers:
                    group.create_task(feed(answer))
        finally:
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(None)

    feeding = asyncio.create_task(feed_all())
    try:
        async for pair in _drained(queue, feeding):
            yield pair
        await feeding
    finally:
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)


async def _drained(
    queue: asyncio.Queue[tuple[Answer, Output] | None], feeding: asyncio.Task[None]
) -> AsyncIterator[tuple[Answer, Output]]:
    while not (feeding.done() and queue.empty()):
        pair = await queue.get()
        if pair is not None:
            yield pair


def _envelope(answers: Sequence[Answer], ask: wire.Ask, suffix: str) -> dict[str, Any]:
    chat = answers[0].chat
    kind = f"chat.completion{suffix}" if chat else "text_completion"
    # The first request's id without its number is the call's.
    return wire.envelope(kind, answers[0].request.id.rsplit("-", 1)[0], ask.model)


def _usage(answers: Sequence[Answer], ask: wire.Ask) -> dict[str, Any]:
    prompts = answers[:: ask.choices]
    return wire.usage(
        sum(answer.request.prompt_tokens for answer in prompts),
        sum(answer.cached_tokens for answer in prompts),
        sum(len(answer.token_ids) for answer in answers),
    )
