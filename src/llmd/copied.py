"""Copies of policies that keep what a user's subclass added."""

from __future__ import annotations

import copy
from typing import Any


class Copied:
    """Deep-copies all attributes, in slots or not.

    Slotted attrs classes copy the fields they know, and silently drop what a
    plain subclass sets on itself; policies are made to be subclassed.

    >>> import attrs
    >>> @attrs.define
    ... class Field(Copied):
    ...     size: int = 1
    >>> class Own(Field):
    ...     def __init__(self):
    ...         super().__init__(size=2)
    ...         self.seen = [3]
    >>> own = Own()
    >>> twin = copy.deepcopy(own)
    >>> twin.size, twin.seen, twin.seen is own.seen
    (2, [3], False)
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        names = dict.fromkeys(
            name
            for kind in type(self).__mro__
            for name in _slots(kind)
            if hasattr(self, name)
        )
        names |= dict.fromkeys(getattr(self, "__dict__", {}))
        for name in names:
            value = copy.deepcopy(getattr(self, name), memo)
            object.__setattr__(twin, name, value)
        return twin


def _slots(kind: type) -> list[str]:
    slots = kind.__dict__.get("__slots__", ())
    names = [slots] if isinstance(slots, str) else [*slots]
    return [name for name in names if name not in ("__weakref__", "__dict__")]
