"""An engine's own tokenizer and chat template."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import InvalidRequest


class Tokenizer:
    """Turns text and conversations into the token ids of one model.

    Methods may be called from any thread, one after another.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # The fast tokenizers of Hugging Face panic when two threads borrow one.
        self._lock = threading.Lock()

    @classmethod
    async def of(cls, llm: Any) -> Tokenizer:
        """Take that of an `AsyncLLM`; asking is a coroutine in some releases."""
        tokenizer = llm.get_tokenizer()
        if inspect.isawaitable(tokenizer):
            tokenizer = await tokenizer
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of *text*, with the model's special tokens."""
        with self._lock:
            return list(self._tokenizer.encode(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of *token_ids*, special tokens left out."""
        with self._lock:
            text: str = self._tokenizer.decode(
                list(token_ids), skip_special_tokens=True
            )
        return text

    def chat(
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
        options = dict(template or {})
        options.setdefault("add_generation_prompt", True)
        try:
            with self._lock:
                ids: list[int] = self._tokenizer.apply_chat_template(
                    plain,
                    tools=list(tools) if tools else None,
                    tokenize=True,
                    return_dict=False,
                    **options,
                )
        except Exception as error:
            raise InvalidRequest(f"chat template: {error}") from error
        return ids


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"a message needs a role: {message!r}")
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        content = "".join(_text(part) for part in content)
    return {**message, "content": content or ""}


def _text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") in ("text", "input_text"):
        text = part.get("text")
        if isinstance(text, str):
            return text
    raise InvalidRequest(f"only text parts are supported, not {part!r}")
