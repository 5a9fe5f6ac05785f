"""Sampling parameters under their OpenAI names, checked before any engine sees them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import InvalidRequest
from ...live.engine import Call


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not _flag(value) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not _flag(value) and abs(value) < 1 << 63


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_whole, value))


def _words(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)


def _bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_number, value.values()))


_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        (
            "frequency_penalty",
            "min_p",
            "presence_penalty",
            "repetition_penalty",
            "temperature",
            "top_p",
        ),
        (_number, "a finite number"),
    ),
    **dict.fromkeys(
        ("logprobs", "min_tokens", "n", "prompt_logprobs", "seed", "top_k"),
        (_whole, "a whole number"),
    ),
    **dict.fromkeys(
        (
            "ignore_eos",
            "include_stop_str_in_output",
            "skip_special_tokens",
            "spaces_between_special_tokens",
        ),
        (_flag, "true or false"),
    ),
    **dict.fromkeys(
        ("allowed_token_ids", "stop_token_ids"), (_ids, "a list of token ids")
    ),
    **dict.fromkeys(("bad_words", "stop"), (_words, "a string or a list of strings")),
    "logit_bias": (_bias, "a map from token id to number"),
}


def checked(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return those parameters that are given, in vLLM's names.

    A None counts as not given, as in JSON.  `logprobs` may be the flag of
    the chat API, with `top_logprobs` beside it.

    Raises:
        InvalidRequest: An unknown name, a wrong type, or more than one answer.

    >>> checked({"temperature": 0, "stop": None})
    {'temperature': 0}
    >>> checked({"temprature": 0})
    Traceback (most recent call last):
    ...
    llmd.errors.InvalidRequest: unknown sampling parameter 'temprature'
    """
    given = {name: value for name, value in sampling.items() if value is not None}
    top = given.pop("top_logprobs", None)
    if _flag(given.get("logprobs")):
        if given.pop("logprobs"):
            given["logprobs"] = 0 if top is None else top
    elif top is not None:
        raise InvalidRequest("top_logprobs needs logprobs to be true")
    for name, value in given.items():
        if name not in _KINDS:
            raise InvalidRequest(f"unknown sampling parameter {name!r}")
        fits, wanted = _KINDS[name]
        if not fits(value):
            raise InvalidRequest(f"{name} is {value!r}, must be {wanted}")
    if given.pop("n", 1) != 1:
        raise InvalidRequest("n must be 1: ask for one answer a call")
    if isinstance(given.get("bad_words"), str):
        given["bad_words"] = [given["bad_words"]]
    return given


def transfer(call: Call) -> dict[str, Any] | None:
    """Return the `kv_transfer_params` of a call, if it is half of a P/D pair.

    To compute a prompt for another engine, NIXL's connector wants all keys of
    its answer in the question, empty.
    """
    if call.kv_transfer is not None:
        return dict(call.kv_transfer)
    if not call.prefill_only:
        return None
    remote = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
    return {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        **dict.fromkeys(remote),
    }


def to_vllm(call: Call, *, detokenize: bool) -> Any:
    """Return vLLM's `SamplingParams` for a call that streams deltas.

    Raises:
        InvalidRequest: vLLM or `checked` refuses them.
    """
    from vllm.sampling_params import RequestOutputKind

    from vllm import SamplingParams

    given = checked(call.sampling)
    if "logit_bias" in given:
        try:
            given["logit_bias"] = {int(k): v for k, v in given["logit_bias"].items()}
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"logit_bias: {error}") from error
    handed = transfer(call)
    try:
        return SamplingParams(
            **given,
            max_tokens=1 if call.prefill_only else call.request.max_new_tokens,
            detokenize=detokenize,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"kv_transfer_params": handed} if handed else None,
        )
    except refusals() as error:
        raise InvalidRequest(str(error)) from error


def refusals() -> tuple[type[Exception], ...]:
    """Return what vLLM raises for a wrong request: its own type since 0.32."""
    from vllm import exceptions

    own = getattr(exceptions, "VLLMClientError", ValueError)
    return (own, ValueError, TypeError)
