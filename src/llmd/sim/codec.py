"""Events and commands as JSON, exact to the last bit.

A value is written as JSON where JSON has it, and otherwise as an object with
one key: `$Type` with its fields, `$enum`, `$set`, `$tuple`, `$u64` for an array
of names, `$f` for the floats that JSON lacks.  Floats keep every bit, as Python
writes the shortest text that reads back the same.

Prompts are written by the names of their blocks, at every block size of the
fleet, so a recording tells nothing of what was said.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from typing import Any

import attrs
import numpy as np

from .. import commands, errors, events, types
from ..blocks import Prompt
from ..commands import Command
from ..errors import InvalidRequest, LlmdError
from ..hashing import Hashes
from ..types import Request

_TYPES: dict[str, type] = {
    name: kind
    for module in (events, types)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and attrs.has(kind)
}
_ENUMS: dict[str, type[enum.Enum]] = {
    name: kind
    for name, kind in vars(types).items()
    if isinstance(kind, type) and issubclass(kind, enum.Enum)
}


class RecordedPrompt(Prompt):
    """A prompt known by the names that its blocks had when it was recorded.

    Names recorded include what salt, adapter and media added; `Request.hashes`
    adds it again, by the key of this process, so `taken_off` takes it off.
    """

    __slots__ = ()

    def __init__(self, tokens: int, names: dict[int, Hashes]) -> None:
        super().__init__(None, tokens)
        self._names = {size: np.zeros_like(known) for size, known in names.items()}

    @property
    def sizes(self) -> tuple[int, ...]:
        """Block sizes at which it is known."""
        return tuple(self._names)

    def head(self, tokens: int) -> RecordedPrompt:
        """Return its first *tokens*."""
        head = RecordedPrompt(tokens, {})
        head._names = {size: n[: tokens // size] for size, n in self._names.items()}
        return head

    def taken_off(self, request: Request, names: dict[int, Hashes]) -> Request:
        """Return *request*, of this prompt, whose hashes are *names* now."""
        added = {size: request.hashes(size) for size in names}
        self._names = {size: known - added[size] for size, known in names.items()}
        return request


def encode(value: Any, sizes: Iterable[int] = ()) -> Any:
    """Return *value* as what `json.dumps` takes.

    Args:
        value: An event, or anything that one is made of.
        sizes: Block sizes at which to name prompts.
    """
    if value is None or isinstance(value, (bool, int, str)):
        if isinstance(value, enum.Enum):
            return {"$enum": [type(value).__name__, value.value]}
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$f": repr(value)}
    if isinstance(value, enum.Enum):
        return {"$enum": [type(value).__name__, value.value]}
    if isinstance(value, np.ndarray):
        return {"$u64": value.tolist()}
    if isinstance(value, (frozenset, set)):
        return {"$set": sorted(value)}
    if isinstance(value, tuple):
        return {"$tuple": [encode(part, sizes) for part in value]}
    if isinstance(value, Request):
        return _encode_request(value, sizes)
    if type(value).__name__ in _TYPES:
        return _fields(value, sizes)
    raise InvalidRequest(f"{type(value).__name__} cannot be recorded")


def decode(value: Any) -> Any:
    """Return what `encode` was given."""
    if isinstance(value, list):
        return [decode(part) for part in value]
    if not isinstance(value, dict):
        return value
    [(key, content)] = value.items()
    match key:
        case "$f":
            return float(content)
        case "$enum":
            return _ENUMS[content[0]](content[1])
        case "$u64":
            return np.array(content, dtype=np.uint64)
        case "$set":
            return frozenset(content)
        case "$tuple":
            return tuple([decode(part) for part in content])
        case "$Request":
            return _decode_request(content)
    kind = _TYPES.get(key[1:])
    if kind is None:
        raise InvalidRequest(f"a recording has {key!r}, which this version lacks")
    return kind(**{name: decode(part) for name, part in content.items()})


def outline(command: Command) -> list[Any]:
    """Return what of a command must be equal for two runs to be equal."""
    match command:
        case commands.Dispatch(request=request, decision=decision):
            return ["Dispatch", request.id, decision.decode, decision.prefill]
        case commands.Requeue(request=request):
            return ["Requeue", request.id]
        case commands.Fail(request=request, error=error):
            return ["Fail", request.id, _kind(error)]
        case commands.Abort(worker=worker, request_id=id):
            return ["Abort", worker, id]
        case commands.Scale(workers=workers, pool=pool):
            return ["Scale", workers, pool]
    fields = attrs.asdict(command, recurse=False)
    return [type(command).__name__, *[repr(field) for field in fields.values()]]


def _fields(value: Any, sizes: Iterable[int]) -> dict[str, Any]:
    given = {
        field.alias or field.name: encode(getattr(value, field.name), sizes)
        for field in attrs.fields(type(value))
        if field.init
    }
    return {f"${type(value).__name__}": given}


def _encode_request(request: Request, sizes: Iterable[int]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        field.name: encode(getattr(request, field.name))
        for field in attrs.fields(Request)
        if field.name != "prompt" and getattr(request, field.name) != field.default
    }
    known: dict[str, list[int]] = {}
    for size in sizes:
        try:
            known[str(size)] = request.hashes(size).tolist()
        except errors.BlockSizeMismatch:
            continue  # A trace's prompt, on a fleet of many sizes.
    return {"$Request": fields | {"tokens": request.prompt_tokens, "names": known}}


def _decode_request(content: dict[str, Any]) -> Request:
    fields = {name: part for name, part in content.items() if name != "names"}
    tokens = fields.pop("tokens")
    given = {name: decode(part) for name, part in fields.items()}
    names = {
        int(size): np.array(hashes, dtype=np.uint64)
        for size, hashes in content["names"].items()
    }
    prompt = RecordedPrompt(tokens, names)
    return prompt.taken_off(Request(prompt=prompt, **given), names)


def _kind(error: LlmdError) -> str:
    return f"{type(error).__name__}: {error}"
