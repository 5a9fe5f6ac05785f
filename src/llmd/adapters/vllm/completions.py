"""vLLM's `/v1/completions`: what is asked and what comes back; no I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import attrs

from ...errors import (
    EngineError,
    InvalidRequest,
    LlmdError,
    PromptTooLong,
    UnknownModel,
)
from ...live.engine import Call, Output
from .calls import prompt_ids
from .sampling import checked, transfer

_TOO_LONG = ("maximum context length", "maximum model length", "max_model_len")


def body(
    call: Call, model: str, max_model_tokens: int, *, priorities: bool
) -> dict[str, Any]:
    """Return the JSON to post.

    Half of a P/D pair that prefills is not streamed: the server tells what its
    partner needs only in a whole answer.

    Raises:
        InvalidRequest: The call makes no sense.
    """
    request = call.request
    ids = prompt_ids(call, max_model_tokens or 1 << 62)
    wanted: dict[str, Any] = {
        **checked(call.sampling),
        "model": model,
        "prompt": ids,
        "request_id": request.id,
        "return_token_ids": True,
        "stream": not call.prefill_only,
    }
    if call.prefill_only:
        wanted["max_tokens"] = 1
    else:
        wanted["stream_options"] = {"include_usage": True}
        new = request.max_new_tokens or max(0, max_model_tokens - len(ids))
        wanted["max_tokens"] = new or None
    if request.salt:
        wanted["cache_salt"] = request.salt
    if priorities:
        wanted["priority"] = request.priority
    if handed := transfer(call):
        wanted["kv_transfer_params"] = handed
    return wanted


class Chunks:
    """Puts together the chunks of a streamed answer.

    The last piece waits for the chunk behind it, which has the counts.

    >>> chunks = Chunks()
    >>> chunks.take('data: {"choices": [{"text": "a", "finish_reason": "stop"}]}')
    []
    >>> chunks.take('data: {"choices": [], "usage": {}}')
    []
    >>> [piece.text for piece in chunks.take("data: [DONE]")], chunks.done
    (['a'], True)
    """

    def __init__(self) -> None:
        self.done = False
        self._last: Output | None = None

    def take(self, line: str) -> list[Output]:
        """Take a line of server-sent events; return the pieces that are whole.

        Raises:
            EngineError: The server reports an error, or sends nonsense.
        """
        if not line.startswith("data:"):
            return []
        data = line[5:].strip()
        if data == "[DONE]":
            self.done = True
            return [self._last] if self._last is not None else []
        chunk = _parsed(data)
        if "error" in chunk:
            raise refusal(0, data)
        cached = _cached(chunk.get("usage"))
        pieces = [_piece(choice, cached) for choice in chunk.get("choices", ())]
        if self._last is not None and cached is not None:
            self._last = attrs.evolve(self._last, cached_tokens=cached)
        if pieces and pieces[-1].finish_reason is not None:
            self._last = pieces.pop()
        return pieces


def whole(answer: bytes) -> Output:
    """Return an answer that was not streamed."""
    parsed = _parsed(answer)
    try:
        piece = _piece(parsed["choices"][0], _cached(parsed.get("usage")))
    except (LookupError, TypeError) as error:
        raise EngineError(f"the server sent nonsense: {answer[:200]!r}") from error
    return attrs.evolve(piece, kv_transfer=parsed.get("kv_transfer_params"))


def refusal(status: int, text: str) -> LlmdError:
    """Return the error that an HTTP status or an error chunk stands for."""
    message = text[:1000]
    try:
        error = json.loads(text)["error"]
        message = error["message"]
        status = status or int(error.get("code") or 0)
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    if status == 404:
        return UnknownModel(message)
    if status in (400, 422):
        if any(words in message for words in _TOO_LONG):
            return PromptTooLong(message)
        return InvalidRequest(message)
    return EngineError(f"HTTP {status}: {message}")


def _piece(choice: Mapping[str, Any], cached: int | None) -> Output:
    reason = choice.get("finish_reason")
    if reason == "error":
        raise EngineError("the server could not finish the answer")
    return Output(
        token_ids=tuple(choice.get("token_ids") or ()),
        text=choice.get("text") or "",
        finish_reason=reason,
        cached_tokens=cached,
        logprobs=choice.get("logprobs"),
    )


def _cached(usage: Any) -> int | None:
    details = usage.get("prompt_tokens_details") if usage else None
    return details.get("cached_tokens") if details else None


def _parsed(data: str | bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except ValueError as error:
        raise EngineError(f"the server sent no JSON: {data[:200]!r}") from error
    if not isinstance(parsed, dict):
        raise EngineError(f"the server sent nonsense: {data[:200]!r}")
    return parsed
