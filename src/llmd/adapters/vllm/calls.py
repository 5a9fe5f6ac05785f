"""A call in vLLM's terms, and what comes back in ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import (
    EngineError,
    InvalidRequest,
    LlmdError,
    PromptTooLong,
    UnknownAdapter,
    WorkerLost,
)
from ...live.engine import Call, Output
from .sampling import refusals


def prompt_ids(call: Call, max_model_tokens: int) -> list[int]:
    """Return the prompt, if it fits the model together with its answer.

    Raises:
        InvalidRequest: Its tokens are not known, or there is more than tokens.
        PromptTooLong: It does not fit.
    """
    request = call.request
    if request.prompt.ids is None:
        raise InvalidRequest(f"{request.id!r} has a prompt without tokens")
    if request.media:
        raise InvalidRequest(
            f"{request.id!r} has media, and only their keys are known here: take a"
            " lease and give them to the engine yourself"
        )
    new = 1 if call.prefill_only else request.max_new_tokens or 1
    if request.prompt_tokens + new > max_model_tokens:
        raise PromptTooLong(
            f"{request.id!r}: {request.prompt_tokens} prompt tokens and {new} new"
            f" ones are more than {max_model_tokens}"
        )
    ids: list[int] = request.prompt.ids.tolist()
    return ids


def lora_request(name: str, loras: Mapping[str, str]) -> Any:
    """Return vLLM's `LoRARequest`, or None for no name.

    Raises:
        UnknownAdapter: The engine does not have it.
    """
    if not name:
        return None
    if name not in loras:
        raise UnknownAdapter(f"no adapter {name!r}, only {sorted(loras)}")
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, [*loras].index(name) + 1, loras[name])


def output(piece: Any) -> Output:
    """Return a `RequestOutput` of vLLM as ours.

    Raises:
        EngineError: vLLM gave up, as when the KV of a prefill engine is gone.
    """
    (answer,) = piece.outputs
    if answer.finish_reason == "error":
        raise EngineError(f"vLLM could not finish {piece.request_id!r}")
    return Output(
        token_ids=tuple(answer.token_ids),
        text=answer.text,
        finish_reason=answer.finish_reason,
        cached_tokens=piece.num_cached_tokens,
        logprobs=answer.logprobs,
        kv_transfer=piece.kv_transfer_params if piece.finished else None,
    )


def translated(error: Exception, death: str | None) -> LlmdError:
    """Return what vLLM raised as an error of ours.

    Args:
        error: From `AsyncLLM.generate`.
        death: What the engine died of, if that was noticed.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, LlmdError):
        return error
    if isinstance(error, EngineDeadError) or death:
        return WorkerLost(death or str(error))
    if isinstance(error, refusals()):
        return InvalidRequest(str(error))
    return EngineError(f"{type(error).__name__}: {error}")
