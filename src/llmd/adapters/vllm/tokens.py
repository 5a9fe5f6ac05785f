"""An engine's own tokenizer and chat template."""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ...errors import InvalidRequest
from .. import _texts

T = TypeVar("T")

_log = logging.getLogger(__name__)


_LONG = 1 << 15
"""Characters from which a text counts as long: some 50 ms, at 2 us each."""


class _Desk:
    """One tokenizer and who waits for it, on a thread of its own.

    Waiting takes no thread that others need, and who gives up is not served.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # The fast tokenizers of Hugging Face panic when two threads borrow one.
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "llmd-tokenizer")

    def do(self, work: Callable[[Any], T]) -> T:
        """Return *work* of the tokenizer."""
        with self._lock:
            return work(self._tokenizer)

    async def done(self, work: Callable[[Any], T]) -> T:
        """Return *work* of the tokenizer, for a coroutine."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.do, work)


class Tokenizer:
    """Turns text and conversations into the token ids of one model.

    Long texts have a copy of the tokenizer, so that they hold up each other
    and nobody else.  Methods may be called from any thread.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._short = _Desk(tokenizer)
        try:
            self._long = _Desk(copy.deepcopy(tokenizer))
        except Exception:
            # Not every model's own can be copied, and a lock is as safe.
            _log.info("%s cannot be copied", type(tokenizer).__name__)
            self._long = self._short

    @classmethod
    async def of(cls, llm: Any) -> Tokenizer:
        """Take that of an `AsyncLLM`; asking is a coroutine in some releases."""
        tokenizer = llm.get_tokenizer()
        if inspect.isawaitable(tokenizer):
            tokenizer = await tokenizer
        return await asyncio.to_thread(cls, tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of *text*, with the model's special tokens."""
        return self._desk(text).do(_encoding(text))

    async def encoded(self, text: str) -> list[int]:
        """Do as `encode`, for a coroutine."""
        return await self._desk(text).done(_encoding(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of *token_ids*, special tokens left out."""
        ids = list(token_ids)
        text: str = self._short.do(
            lambda one: one.decode(ids, skip_special_tokens=True)
        )
        return text

    async def prompted(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the prompt of a conversation whose next turn is the model's.

        Args:
            messages: As in the OpenAI API; text parts are joined.
            tools: As in the OpenAI API, for templates that know them.
            template: Further variables of the template.

        Raises:
            InvalidRequest: The model has no template, or it refuses these.
        """
        plain = [_plain(message) for message in messages]
        desk = self._desk([plain, tools, template])
        return await desk.done(_templating(plain, tools, template))

    def _desk(self, texts: Any) -> _Desk:
        return self._long if _texts.exceed(texts, _LONG) else self._short


def _encoding(text: str) -> Callable[[Any], list[int]]:
    return lambda tokenizer: list(tokenizer.encode(text))


def _templating(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    template: Mapping[str, Any] | None,
) -> Callable[[Any], list[int]]:
    options = {"add_generation_prompt": True, **(template or {})}

    def work(tokenizer: Any) -> list[int]:
        try:
            ids: list[int] = tokenizer.apply_chat_template(
                messages,
                tools=list(tools) if tools else None,
                tokenize=True,
                return_dict=False,
                **options,
            )
        except Exception as error:
            raise InvalidRequest(f"chat template: {error}") from error
        return ids

    return work


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"a message needs a role: {message!r}")
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "".join(_text(part) for part in content)
    if content is not None and not isinstance(content, str):
        raise InvalidRequest(f"the content of a message is {content!r}, not text")
    return {**message, "content": content or ""}


def _text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") in ("text", "input_text"):
        text = part.get("text")
        if isinstance(text, str):
            return text
    raise InvalidRequest(f"only text parts are supported, not {part!r}")
