"""Orders of one queue: who goes first among those of one flow."""

from __future__ import annotations

from typing import Any

import attrs

from ..types import Request
from ..view import Mask, View
from .interface import QueueBalancer
from .verdict import ADMIT, Verdict


@attrs.define
class Fcfs(QueueBalancer):
    """First come, first served, within a priority.

    Attributes:
        max_running: Requests running at once on each worker; None leaves it
            to what each batches at once.
        max_waiting: Requests waiting at once, in all.

    >>> Fcfs(max_running=8).max_waiting
    100000
    """

    max_running: int | None = None
    max_waiting: int = 100_000

    def key(self, request: Request, view: View) -> Any:
        return request.priority

    def admit(self, request: Request, view: View) -> Verdict:
        if len(view.waiting) >= self.max_waiting:
            return Verdict(False, f"{len(view.waiting)} requests wait already", 1.0)
        return ADMIT

    def room(self, request: Request, view: View) -> Mask:
        if self.max_running is None:
            return super().room(request, view)
        return view.workers.running_requests < self.max_running
