"""How much text there is in a JSON value."""

from __future__ import annotations

from typing import Any


def exceed(value: Any, characters: int) -> bool:
    """Say whether the strings in *value* have more than so many characters.

    What is no string counts as one, so the walk ends soon in any case.

    >>> exceed(["abc", {"d": 5}], 5), exceed(["abc", {"d": 5}], 8)
    (True, False)
    """
    left, todo = characters, [value]
    while todo and left >= 0:
        one = todo.pop()
        if isinstance(one, str):
            left -= len(one)
        elif isinstance(one, dict):
            todo += one
            todo += one.values()
            left -= 1
        elif isinstance(one, list | tuple):
            todo += one
            left -= 1
        else:
            left -= 1
    return left < 0
