"""The `QueueBalancer` interface."""

from __future__ import annotations

import abc
import math
from collections.abc import Collection, Hashable, Iterable
from typing import Any, NamedTuple

from ..booking import Booking
from ..copied import Copied
from ..types import Request, RequestId
from ..view import Mask, View
from .verdict import ADMIT, Verdict


class Place(NamedTuple):
    """Where a request waits.

    Attributes:
        key: Its order within its flow; smallest leaves first, equal ones in
            order of arrival.
        flow: The flow it waits in.
        lane: Requests of one lane hold each other up when no worker has room
            for the first of them; those of different lanes never do.  Those
            of different models, adapters or size classes are apart anyway.
        until: When to ask for its place again, seconds.

    >>> Place(3.5).until
    inf
    """

    key: Any
    flow: Hashable = ""
    lane: Hashable = ()
    until: float = math.inf


class Listener(Copied):
    """Hears what becomes of requests; every hook may be left alone.

    A request is `queued` and `unqueued` each time it waits, in turn, and a
    booking is `dispatched` and `ended` once, also one that waits again.  Where
    `queued` or `dispatched` raises, its counterpart does not follow.  A
    listener put into a running cluster has not heard the beginning of what
    is already in flight.
    """

    def admitted(self, request: Request, view: View) -> None:
        """Note that *request* came in; not said again when it is retried."""

    def queued(self, request: Request, view: View) -> None:
        """Note that *request* waits now."""

    def unqueued(self, request: Request, view: View) -> None:
        """Note that *request* waits no more, whatever the reason."""

    def dispatched(self, booking: Booking, view: View) -> None:
        """Note that a request was sent on; fair orders charge for it here."""

    def generated(self, booking: Booking, tokens: int, view: View) -> None:
        """Note that *tokens* more were generated, the first one included.

        `view.now - booking.last_token_at` is what they took.
        """

    def ended(self, booking: Booking, view: View) -> None:
        """Note that a booking is over, in whatever way."""


class QueueBalancer(Listener, abc.ABC):
    """Orders the requests that wait and says where the next may go.

    `key` alone makes an order.  Fairness takes two more: `flow` says whom a
    request belongs to, and `turn` which flow goes next.  The next request is
    the one with the smallest turn of its flow, then the smallest key, then
    the earliest arrival.

    >>> class ShortestFirst(QueueBalancer):
    ...     def key(self, request, view):
    ...         return request.prompt_tokens

    >>> class LeastServed(QueueBalancer):
    ...     def __init__(self):
    ...         self.tokens = {}
    ...     def key(self, request, view):
    ...         return request.priority
    ...     def flow(self, request):
    ...         return request.tenant
    ...     def turn(self, flow, view):
    ...         return self.tokens.get(flow, 0)
    ...     def generated(self, booking, tokens, view):
    ...         tenant = booking.request.tenant
    ...         self.tokens[tenant] = self.tokens.get(tenant, 0) + tokens
    """

    @abc.abstractmethod
    def key(self, request: Request, view: View) -> Any:
        """Return a sort key, asked when it begins to wait; smallest goes first."""

    def flow(self, request: Request) -> Hashable:
        """Return whom *request* belongs to; must not change with time."""
        return ""

    def turn(self, flow: Hashable, view: View) -> Any:
        """Return the sort key of a flow in which somebody waits; smallest next.

        Asked again after any hook was called for a request of the flow, and
        for flows in `restless` before every dispatch; else it is remembered.
        """
        return 0

    def place(self, request: Request, view: View, since: float) -> Place:
        """Return where *request*, here since *since*, waits.

        Orders that change with time override this one and set `until`.
        """
        return Place(self.key(request, view), self.flow(request))

    @property
    def restless(self) -> Collection[Hashable]:
        """Flows whose turn may change by what happens to others."""
        return ()

    def moved(self, view: View) -> Iterable[RequestId]:
        """Return requests whose place may have changed by what happened.

        Asked before every dispatch; ids that do not wait are ignored.
        """
        return ()

    def tokens_before(self, request: Request, view: View) -> int:
        """Return the waiting prompt tokens that go before *request*, at most.

        Those that no worker of its own could serve do not count.
        """
        return view.waiting.tokens_of(view.workers.models_beside(request.model))

    @property
    def pressing(self) -> Collection[RequestId]:
        """Requests that have waited too long for others to be sent past them."""
        return ()

    def opens_at(self, view: View, after: float) -> float:
        """Return the first time past *after* at which time alone makes room.

        Infinity for never; it may be too early, but not too late.
        """
        return math.inf

    def tokens_ahead(self, request: Request, view: View) -> int:
        """Return the waiting prompt tokens expected to go before *request*.

        For estimates of its wait; at most `tokens_before`.
        """
        return self.tokens_before(request, view)

    def admit(self, request: Request, view: View) -> Verdict:
        """Say whether *request* may wait here at all."""
        return ADMIT

    def share(self, request: Request, view: View) -> float:
        """Return what part of a worker's room it may fill, in (0, 1]."""
        return 1.0

    def room(self, request: Request, view: View) -> Mask:
        """Say which workers may take *request* now, shape (W,).

        Asked only of the request next in its lane, with the workers ready to
        serve it in *view*; none true holds the lane.
        The default keeps the engines' own queues empty, where order binds no
        more: a worker takes as many requests as it batches at once.
        """
        return view.workers.running_requests < view.workers.max_running

    def preempts(self, request: Request, view: View) -> bool:
        """Say whether any work might make place for *request*; False saves looking."""
        return type(self).yields is not QueueBalancer.yields

    def yields(self, booking: Booking, request: Request, view: View) -> bool:
        """Say whether running work makes place for a request without room.

        Asked only of sheddable bookings that streamed nothing or can be resumed.
        """
        return False
