"""Who goes next: the `QueueBalancer` interface and its orders."""

from __future__ import annotations

import abc
from typing import Any

import attrs

from .types import Request
from .view import Mask, View


@attrs.frozen
class Verdict:
    """Whether a request may enter.

    Attributes:
        admitted: False refuses it.
        reason: Why it was refused, for the client.
        retry_after: Seconds until another try makes sense; NaN if unknown.
    """

    admitted: bool
    reason: str = ""
    retry_after: float = float("nan")


ADMIT = Verdict(True)


class QueueBalancer(abc.ABC):
    """Orders the requests that wait and says where the next may go.

    >>> class ShortestFirst(QueueBalancer):
    ...     def key(self, request, view):
    ...         return request.prompt_tokens
    """

    @abc.abstractmethod
    def key(self, request: Request, view: View) -> Any:
        """Return a sort key, computed once on arrival; smallest leaves first.

        Equal keys leave in order of arrival.
        """

    def admit(self, request: Request, view: View) -> Verdict:
        """Say whether *request* may wait here at all."""
        return ADMIT

    def room(self, request: Request, view: View) -> Mask:
        """Say which workers may take *request* now, shape (W,).

        Asked only of the request next in order; none true holds the queue.
        The default keeps the engines' own queues empty, where order binds no
        more: a worker takes as many requests as it batches at once.
        """
        return view.workers.running_requests < view.workers.max_running

    def dispatched(self, request: Request, uncached_tokens: int, view: View) -> None:
        """Note that *request* was sent on; fair orders charge for it here."""

    def generated(self, request: Request, tokens: int, view: View) -> None:
        """Note that *tokens* more were generated for *request*."""


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
