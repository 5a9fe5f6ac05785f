"""Errors, as OpenAI's clients read them."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

from ...errors import (
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    LlmdError,
    PolicyError,
    Rejected,
    UnknownAdapter,
    UnknownModel,
    WorkerLost,
)

_MOST_CHARACTERS = 1000  # a message may quote what the client sent, all of it


class TooLarge(InvalidRequest):
    """The body exceeds what the edge reads."""


def first(error: Exception) -> Exception:
    """Return the error that a group of tasks failed with first."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def status_of(error: Exception) -> int:
    """Return the HTTP status that says whose fault *error* is."""
    match error:
        case TooLarge():
            return 413
        case UnknownModel() | UnknownAdapter():
            return 404
        case InvalidRequest():
            return 400
        case Rejected():
            return 429
        case DeadlineExceeded():
            return 504
        case WorkerLost() | EngineError():
            return 503
    return 500


def is_ours(error: Exception) -> bool:
    """Say whether *error* is a bug here or in a policy, which a log must tell."""
    return isinstance(error, PolicyError) or not isinstance(error, LlmdError)


def body_of(error: Exception) -> dict[str, Any]:
    """Return the body that tells a client of *error*."""
    if not isinstance(error, LlmdError):
        return body(500, "internal error", "InternalError")
    said = error.brief if isinstance(error, PolicyError) else str(error)
    return body(status_of(error), said, type(error).__name__)


def body(status: int, message: str, code: str) -> dict[str, Any]:
    """Return the body of an answer with an error's status."""
    if len(message) > _MOST_CHARACTERS:
        message = f"{message[:_MOST_CHARACTERS]}..."
    kind = "invalid_request_error" if status < 429 else "server_error"
    return {
        "error": {
            "message": message,
            "type": "rate_limit_error" if status == 429 else kind,
            "param": None,
            "code": code,
        }
    }


def body_of_status(status: int, path: str) -> dict[str, Any]:
    """Return the body for a path that is not there, or not in this way."""
    phrase = HTTPStatus(status).phrase
    return body(status, f"{path}: {phrase.lower()}", phrase.title().replace(" ", ""))


def retry_after(error: Exception) -> dict[str, str]:
    """Return the header that says when to try again, if that is known."""
    if isinstance(error, Rejected):
        known = math.isfinite(error.retry_after)
        seconds = error.retry_after if known else 1.0
        return {"Retry-After": str(max(1, math.ceil(seconds)))}
    return {"Retry-After": "1"} if status_of(error) == 503 else {}
