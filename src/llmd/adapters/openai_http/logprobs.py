"""Log probabilities, from vLLM's words into OpenAI's.

For each generated token vLLM gives a dict from token id to an object with
`logprob`, `rank` and `decoded_token`; the generated token comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def completion(tokens: Sequence[Mapping[int, Any]]) -> dict[str, Any]:
    """Return the `logprobs` of a completion choice."""
    chosen = [_chosen(token) for token in tokens]
    names = [_name(*pair) for pair in chosen]
    offsets, end = [], 0
    for name in names:
        offsets.append(end)
        end += len(name)
    return {
        "tokens": names,
        "token_logprobs": [_finite(mark.logprob) for _, mark in chosen],
        "top_logprobs": [_top(token) for token in tokens],
        "text_offset": offsets,
    }


def chat(tokens: Sequence[Mapping[int, Any]]) -> dict[str, Any]:
    """Return the `logprobs` of a chat choice."""
    return {
        "content": [
            {
                **_entry(*_chosen(token)),
                "top_logprobs": [_entry(*pair) for pair in token.items()],
            }
            for token in tokens
        ]
    }


def _top(token: Mapping[int, Any]) -> dict[str, float]:
    """Return log probabilities by name; of two with one name, one shows its id."""
    top: dict[str, float] = {}
    for id, mark in token.items():
        name = _name(id, mark)
        top[f"token_id:{id}" if name in top else name] = _finite(mark.logprob)
    return top


def _chosen(token: Mapping[int, Any]) -> tuple[int, Any]:
    return next(iter(token.items()))


def _entry(id: int, mark: Any) -> dict[str, Any]:
    name = _name(id, mark)
    return {
        "token": name,
        "logprob": _finite(mark.logprob),
        "bytes": list(name.encode()),
    }


def _name(id: int, mark: Any) -> str:
    decoded: str | None = mark.decoded_token
    return f"token_id:{id}" if decoded is None else decoded


def _finite(logprob: float) -> float:
    # JSON knows no infinity; OpenAI writes the least likely as -9999.
    return max(logprob, -9999.0)
