"""What an engine needs beside `Engine` to share a GPU."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Sliceable(Protocol):
    """What an engine needs beside `Engine` to share a GPU."""

    async def pause(self) -> None:
        """Freeze all requests at the next step boundary, losing nothing."""

    async def resume(self) -> None:
        """Go on after `pause`."""


@runtime_checkable
class Sleeper(Sliceable, Protocol):
    """An engine that can also give its memory away; it is paused meanwhile."""

    async def sleep(self) -> None:
        """Free the GPU memory; frozen requests survive."""

    async def wake(self) -> None:
        """Take the memory back and stay paused."""
