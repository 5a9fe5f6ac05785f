"""Package faces that import a name's module when the name is first asked for.

Importing llmd costs what a cluster needs and no more: forty policies that a
program does not name are not built.  What a package offers, and from where, is
written once, in its `__init__.pyi`, where type checkers and editors read it
too; this module reads the same file.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def face(
    package: str, file: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of *package*.

    Args:
        package: Its `__name__`.
        file: Its `__file__`, beside which the `.pyi` lies.
    """
    homes = _homes(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))

    def __getattr__(name: str) -> Any:  # noqa: N807
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{home or name}")
        value = getattr(module, name) if home else module
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:  # noqa: N807
        return sorted({*vars(sys.modules[package]), *homes})

    # Importing a module sets it on its package, over a function of its name.
    for name in [name for name, home in homes.items() if home == name]:
        __getattr__(name)
    return __getattr__, __dir__, sorted(homes)


def _homes(stub: str) -> dict[str, str]:
    """Return the module of each name a stub imports; empty if it is a module.

    >>> _homes("from . import events; from .a.b import Router")
    {'events': '', 'Router': 'a.b'}
    """
    return {
        alias.asname or alias.name: node.module or ""
        for node in ast.parse(stub).body
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
