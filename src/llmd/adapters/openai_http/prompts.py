"""Texts and conversations become token ids, by the model's own engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import attrs

from ...errors import DeadlineExceeded, EngineError, PromptTooLong
from ...live import Engine
from .. import _texts
from . import wire
from .names import Names, serves

CHARACTERS_A_TOKEN = 128
"""The most that a token is taken to stand for.

Tokens of usual text have about 4 characters.  The longest in vocabularies in
use are runs of spaces, up to 128 of them, so that what is refused by this
would be refused by its tokens as well; but those take seconds a megabyte.
"""

_TIMEOUT = 60.0


@attrs.frozen
class _Reader:
    engine: Engine
    max_tokens: int


@attrs.define(eq=False)
class Tokenizers:
    """Finds an engine to tokenise for a model or an adapter.

    The last engine of each is remembered, since its tokenizer still works
    while the model is scaled to zero.
    """

    names: Names
    _last: dict[str, _Reader] = attrs.field(factory=dict, init=False)

    async def text(self, ask: wire.Ask, text: str) -> list[int]:
        """Return the token ids of *text*.

        Raises:
            UnknownModel: Nobody answers to the model's name.
            PromptTooLong: It cannot fit, however it is tokenised.
        """
        reader = self._fitting(ask.model, text)
        return await _in_time(reader.engine.tokenize(text), ask.timeout)

    async def chat(self, ask: wire.Ask, messages: list[Any]) -> list[int]:
        """Return the prompt of a conversation, by the model's own template.

        Raises:
            UnknownModel: Nobody answers to the model's name.
            PromptTooLong: It cannot fit, however it is tokenised.
        """
        reader = self._fitting(ask.model, [messages, ask.tools, ask.template])
        work = reader.engine.chat(
            messages, tools=ask.tools or None, template=ask.template or None
        )
        return await _in_time(work, ask.timeout)

    def _fitting(self, name: str, texts: Any) -> _Reader:
        reader = self._reader(name)
        most = reader.max_tokens * CHARACTERS_A_TOKEN
        if _texts.exceed(texts, most):
            raise PromptTooLong(
                f"the prompt has more than {most} characters, and the model takes"
                f" {reader.max_tokens} tokens"
            )
        return reader

    def _reader(self, name: str) -> _Reader:
        model, lora = self.names.resolve(name)
        server = self.names.server
        workers = server.cluster.view.workers
        able = [
            worker
            for worker, ready in zip(workers.facts, workers.ready(), strict=True)
            if ready and serves(worker, model, lora)
        ]
        if not able:
            if name not in self._last:
                raise EngineError(f"no worker of model {name!r} has started yet")
            return self._last[name]
        longest = max(worker.max_model_tokens for worker in able)
        reader = _Reader(server.engine(able[0].id), longest)
        # Not what a worker that answers to any name was called.
        if name in able[0].models | able[0].loras:
            self._last[name] = reader
        return reader


async def _in_time(work: Awaitable[list[int]], seconds: float) -> list[int]:
    try:
        async with asyncio.timeout(min(seconds, _TIMEOUT)):
            return await work
    except TimeoutError as error:
        if seconds <= _TIMEOUT:
            raise DeadlineExceeded("the prompt was not read in time") from error
        raise EngineError(f"no tokens of the prompt in {_TIMEOUT} s") from error
