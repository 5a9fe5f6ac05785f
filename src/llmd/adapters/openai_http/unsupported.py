"""What the edge does not do, refused: an answer must not quietly be another.

Keys that change nothing in the answer may be ignored; these do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...errors import InvalidRequest

# Each with the values that ask for nothing, beside null.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}

# Arguments of Hugging Face's `apply_chat_template`, no variables of a template.
# A template of the client's own could loop for ever, a padding fill the memory.
_NO_VARIABLES = frozenset(
    (
        "chat_template",
        "conversation",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    )
)


def refuse(body: Mapping[str, Any]) -> None:
    """Raise InvalidRequest if *body* asks for what is not supported."""
    for name, value in body.items():
        if value is None:
            continue
        harmless = _HARMLESS.get(name)
        if harmless is None:
            harmless = () if name.startswith("guided_") else (value,)
        if not any(type(value) is type(one) and value == one for one in harmless):
            raise InvalidRequest(f"{name} is not supported{_but(harmless)}")


def tools_of(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the tools that the template is to show.

    Raises:
        InvalidRequest: The model may call them: calls would come back as text.
    """
    tools = body.get("tools")
    if not tools:
        return []
    if body.get("tool_choice") != "none":
        raise InvalidRequest('tools is not supported, but with tool_choice of "none"')
    if not isinstance(tools, list) or not all(isinstance(one, dict) for one in tools):
        raise InvalidRequest("tools that are no list of objects is not supported")
    return tools


def template_of(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return further variables of the chat template.

    Raises:
        InvalidRequest: It is no object, or has what is no variable.
    """
    given = body.get("chat_template_kwargs")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise InvalidRequest("chat_template_kwargs is not an object")
    if wrong := sorted(_NO_VARIABLES & given.keys()):
        raise InvalidRequest(f"chat_template_kwargs may not have {', '.join(wrong)}")
    return given


def _but(harmless: tuple[Any, ...]) -> str:
    return f", only {json.dumps(harmless[0])}" if harmless else ""
