"""Tables and names, for people to read."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import attrs

from ..machines import Machine


def name_of(policy: object) -> str:
    """Return a short name: the class, and whatever is not by default.

    >>> from llmd import LeastWork, Machine, EarliestFirstToken
    >>> name_of(LeastWork()), name_of(LeastWork(decode_tokens=9.0))
    ('LeastWork', 'LeastWork(decode_tokens=9.0)')
    >>> name_of(EarliestFirstToken(machines={"a": Machine(name="h200")}))
    'EarliestFirstToken(machines={a: h200})'
    """
    kind = type(policy)
    made = getattr(getattr(kind.__repr__, "__code__", None), "co_filename", "")
    if not attrs.has(kind) or not made.startswith("<attrs generated"):
        plain = kind.__repr__ is object.__repr__
        return kind.__name__ if plain else repr(policy)
    changed = []
    for field in attrs.fields(kind):
        if field.init and field.repr:
            value = getattr(policy, field.name)
            if value != _default(field.default):
                changed.append(f"{field.name.lstrip('_')}={_short(value)}")
    return kind.__name__ + (f"({', '.join(changed)})" if changed else "")


def _short(value: object) -> str:
    """Return what tells *value* in a table."""
    if isinstance(value, Machine):
        return value.name
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_short(value[key])}" for key in value) + "}"
    return repr(value)


def _default(default: object) -> object:
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return None if default.takes_self else default.factory()  # type: ignore[attr-defined]
    return default


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out a table in text."""
    cells = [list(head), *[list(row) for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        ).rstrip()
        for row in cells
    ]
    return [lines[0], "  ".join(["-" * width for width in widths]), *lines[1:]]


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table in HTML."""
    top = "".join([f"<th>{html.escape(cell)}</th>" for cell in head])
    body = "".join(
        [
            "<tr>" + "".join([f"<td>{html.escape(c)}</td>" for c in row]) + "</tr>"
            for row in rows
        ]
    )
    return f"<table><tr>{top}</tr>{body}</table>"
