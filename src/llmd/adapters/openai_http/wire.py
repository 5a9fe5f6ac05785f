"""What comes over the wire, checked; and what goes back, as plain dicts."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from starlette.requests import Request as HttpRequest

from ...errors import InvalidRequest
from . import unsupported
from .faults import TooLarge

MAX_CHOICES = 128

# Strict UTF-8 has no surrogates: only an escape can bring one, alone or paired.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NO_TEXT = "a string in the body is not Unicode text: it has a lone surrogate"

_SAMPLING = (
    "allowed_token_ids",
    "bad_words",
    "frequency_penalty",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "logprobs",
    "min_p",
    "min_tokens",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stop",
    "stop_token_ids",
    "temperature",
    "top_k",
    "top_logprobs",
    "top_p",
)


@attrs.frozen(kw_only=True)
class Ask:
    """One HTTP call for text, checked.

    Attributes:
        model: Name, perhaps of an adapter; empty if not given.
        max_new_tokens: Or None if not given.
        choices: Answers wanted for each prompt.
        stream: Whether to answer in pieces.
        include_usage: Whether the last piece tells token counts.
        tools: For the chat template to show.
        template: Further variables of the chat template.
        sampling: For the engine.
        tenant: Who to be fair to.
        session: Conversation, from a header.
        salt: Cache salt.
        priority: Smaller runs earlier.
        sheddable: More urgent work may take its place before it has answered.
        resumable: And after, or another worker go on if its own fails.
        timeout: Seconds the client waits, or infinity.
    """

    model: str
    max_new_tokens: int | None
    choices: int
    stream: bool
    include_usage: bool
    tools: Sequence[Mapping[str, Any]]
    template: Mapping[str, Any]
    sampling: Mapping[str, Any]
    tenant: str
    session: str
    salt: str
    priority: int
    sheddable: bool
    resumable: bool
    timeout: float


async def read(http: HttpRequest, limit_bytes: int) -> Mapping[str, Any]:
    """Return the JSON object of a body.

    Raises:
        TooLarge: More than *limit_bytes*; the rest is not read.
        InvalidRequest: Not a JSON object in UTF-8, or with strings that are
            not Unicode text.
    """
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise TooLarge(f"the body exceeds {limit_bytes} bytes")
    try:
        read = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        if _SURROGATE.search(body):
            json.dumps(read, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(_NO_TEXT) from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON in UTF-8: {error}") from error
    if not isinstance(read, dict):
        raise InvalidRequest("the body is not a JSON object")
    return read


def ask(http: HttpRequest, body: Mapping[str, Any], default_tokens: int | None) -> Ask:
    """Check what every endpoint has in common.

    Raises:
        InvalidRequest: A value is of the wrong type or out of range.
    """
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise InvalidRequest("stream_options is not an object")
    unsupported.refuse(body)
    choices = _whole(body, "n", None)
    choices = 1 if choices is None else choices
    if not 1 <= choices <= MAX_CHOICES:
        raise InvalidRequest(f"n is {choices}, must be 1 to {MAX_CHOICES}")
    return Ask(
        model=_text(body, "model"),
        max_new_tokens=_new_tokens(body, default_tokens),
        choices=choices,
        stream=_flag(body, "stream"),
        include_usage=_flag(options, "include_usage"),
        tools=unsupported.tools_of(body),
        template=unsupported.template_of(body),
        sampling={name: body[name] for name in _SAMPLING if body.get(name) is not None},
        tenant=http.headers.get("x-llmd-tenant") or _text(body, "user"),
        session=http.headers.get("x-session-id", ""),
        salt=_text(body, "cache_salt"),
        priority=_whole(body, "priority", 0) or 0,
        sheddable=_flag(body, "sheddable"),
        resumable=_flag(body, "resumable"),
        timeout=_timeout(http),
    )


def usage(prompt: int, cached: int, new: int) -> dict[str, Any]:
    """Return token counts."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def envelope(kind: str, id: str, model: str) -> dict[str, Any]:
    """Return what every answer and every piece of one begins with."""
    return {"id": id, "object": kind, "created": int(time.time()), "model": model}


def card(name: str) -> dict[str, Any]:
    """Return the entry of a model or adapter."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "llmd"}


def prompts_of(body: Mapping[str, Any]) -> list[str | Sequence[int]]:
    """Return the prompts of a completion call: texts or lists of token ids.

    Raises:
        InvalidRequest: Anything else, none, or too many.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, str) or _token_ids(prompt):
        return [prompt]  # type: ignore[list-item]
    if not isinstance(prompt, list) or not prompt:
        raise InvalidRequest("prompt must be text, token ids, or a list of these")
    if len(prompt) > MAX_CHOICES:
        raise InvalidRequest(
            f"{len(prompt)} prompts in one call, {MAX_CHOICES} at most"
        )
    if not all(isinstance(one, str) or _token_ids(one) for one in prompt):
        raise InvalidRequest("prompt must be text, token ids, or a list of these")
    return prompt


def messages_of(body: Mapping[str, Any]) -> list[Any]:
    """Return the messages of a chat call.

    Raises:
        InvalidRequest: None, or not a list of messages in text.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a list with at least one message")
    for message in messages:
        if not isinstance(message, dict):
            raise InvalidRequest("a message must be an object")
        if not isinstance(message.get("role"), str):
            raise InvalidRequest("a message needs a role, as text")
        if not _is_content(message.get("content")):
            raise InvalidRequest(
                "the content of a message must be text, or a list of text parts"
            )
    return messages


def _is_content(content: Any) -> bool:
    if isinstance(content, list):
        return all(isinstance(part, str) or _is_text_part(part) for part in content)
    # A turn that only called tools has no content.
    return content is None or isinstance(content, str)


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.get("type") in ("text", "input_text")
        and isinstance(part.get("text"), str)
    )


def _token_ids(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(type(token) is int and 0 <= token < 1 << 32 for token in prompt)
    )


def _whole(body: Mapping[str, Any], name: str, default: int | None) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or abs(value) >= 1 << 63:
        raise InvalidRequest(f"{name} is {value!r}, must be a whole number")
    return value


def _new_tokens(body: Mapping[str, Any], default: int | None) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        given = _whole(body, name, None)
        if given is not None:
            if given < 1:
                raise InvalidRequest(f"{name} is {given}, must be at least 1")
            return given
    return default


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is {value!r}, must be text")
    return value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{name} is {value!r}, must be true or false")
    return bool(value)


def _timeout(http: HttpRequest) -> float:
    given = http.headers.get("x-request-timeout", "inf")
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise InvalidRequest(f"x-request-timeout is {given!r}, must be seconds")
    return seconds


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
