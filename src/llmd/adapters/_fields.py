"""Values of a manifest that know where they stand in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from ..errors import InvalidPolicy, shown


@attrs.frozen
class Field:
    """A value of a document, and the path of its field.

    What it refuses it names by that path, as Kubernetes' API server does.

    >>> spec = Field({"maxReplicas": "many"}, "spec")
    >>> spec.need("maxReplicas").whole()
    Traceback (most recent call last):
    llmd.errors.InvalidPolicy: spec.maxReplicas is 'many', must be a whole number
    """

    value: Any
    path: str

    def get(self, name: str) -> Field | None:
        """Return a field of this object; None if it is not there, or null."""
        if not isinstance(self.value, Mapping):
            raise self.wrong("must be an object")
        value = self.value.get(name)
        return None if value is None else Field(value, self._below(name))

    def need(self, name: str) -> Field:
        """Return a field that must be there."""
        found = self.get(name)
        if found is None:
            raise InvalidPolicy(f"{self._below(name)} is missing")
        return found

    def only(self, names: str) -> None:
        """Refuse fields that nobody reads: most often they are slips of the pen."""
        if not isinstance(self.value, Mapping):
            raise self.wrong("must be an object")
        if unknown := sorted(map(str, self.value.keys() - {*names.split()})):
            path = self.path or "the manifest"
            raise InvalidPolicy(f"{path} has unknown fields: {', '.join(unknown)}")

    def items(self) -> list[Field]:
        """Return the members of a list."""
        if not isinstance(self.value, list | tuple):
            raise self.wrong("must be a list")
        return [Field(item, f"{self.path}[{i}]") for i, item in enumerate(self.value)]

    def whole(self) -> int:
        """Return a whole number."""
        if type(self.value) is not int:
            raise self.wrong("must be a whole number")
        return self.value

    def text(self) -> str:
        """Return a text that says something."""
        if not isinstance(self.value, str) or not self.value:
            raise self.wrong("must be a text")
        return self.value

    def one_of(self, *known: str) -> str:
        """Return one of the *known* texts."""
        if self.value not in known:
            raise self.wrong(f"must be {' or '.join(known)}")
        return str(self.value)

    def wrong(self, why: str) -> InvalidPolicy:
        """Return the error that names this field, its value and *why*."""
        path = self.path or "the manifest"
        return InvalidPolicy(f"{path} is {shown(self.value)}, {why}")

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Have this field named by what is refused within."""
        try:
            yield
        except InvalidPolicy as error:
            raise InvalidPolicy(f"{self.path}: {error}") from None

    def _below(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name
