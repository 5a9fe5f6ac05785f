"""What goes wrong in a simulated fleet."""

from __future__ import annotations

import math

import attrs

from ..errors import InvalidRequest
from ..types import WorkerId


@attrs.frozen(kw_only=True)
class Crash:
    """A worker dies.

    Attributes:
        at: When.
        worker: Which, or who has taken its place since; nothing happens if that
            is gone.
        restart_after_s: Seconds until another joins in its place; inf: never.
    """

    at: float
    worker: WorkerId
    restart_after_s: float = math.inf

    def __attrs_post_init__(self) -> None:
        if not (0.0 <= self.at < math.inf and self.restart_after_s >= 0.0):
            raise InvalidRequest(f"{self!r} has no time")
