"""The cluster: events in, commands out, no input or output of its own.

A driver feeds it every event in order of time and carries out the commands
that come back, in order; `llmd.sim` does so in virtual time on modelled
workers, `llmd.live` in real time on engines.  Policies are asked,
synchronously, whenever something may have changed for them, and see one `View`
whose columns are kept up to date in place.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import attrs

from .balancer.verdict import Verdict
from .commands import Command
from .core import Core
from .decision import Decision
from .dispatching import has_to_wait
from .errors import InvalidEvent, policy_error
from .events import Event
from .transitions import TRANSITIONS
from .types import Request, RequestId

_log = logging.getLogger("llmd.cluster")


@attrs.define(eq=False)
class Cluster(Core):
    """Follows the workers and decides what runs where.

    Equal events and an equal seed give equal commands, so a recorded run can
    be replayed, also against another policy.  Policies may be replaced at any
    time by assigning to the attribute; nothing in flight is touched.

    A policy that raises, or breaks its contract, ends the request it was asked
    about with a `PolicyError` and nothing else.

    Attributes:
        router: Chooses a worker for each request.
        balancer: Orders the requests that wait.
        autoscaler: Chooses the number of workers; None leaves it alone.
        index: Knows who holds which prefix.
        max_attempts: Dispatches of one request before it fails.
        seed: Of all randomness.
        observer: Called with every event and then its commands; what it raises
            is logged.
        view: What policies see.

    >>> from llmd.events import RequestArrived, WorkerJoined
    >>> from llmd.types import Request, Worker
    >>> cluster = Cluster()
    >>> cluster.handle(WorkerJoined(0.0, Worker(id="a")))
    []
    >>> request = Request(id="r", prompt=[1, 2, 3])
    >>> [command] = cluster.handle(RequestArrived(0.1, request))
    >>> command.decision.decode
    'a'
    """

    observer: Callable[[Event | Command], object] | None = None

    def handle(self, event: Event) -> list[Command]:
        """Take in *event* and return what must now be done, in order.

        Raises:
            InvalidEvent: It is older than the last one, of an unknown type, or
                names a worker that is there already.
            InvalidRequest: The request that arrived cannot be served here; its
                subclasses say why.
            PolicyError: The autoscaler broke its contract.

        Whatever is raised, nothing has changed.
        """
        transition = TRANSITIONS.get(type(event))
        if transition is None:
            raise InvalidEvent(f"{event!r} is of no type a cluster knows")
        if not self.view.now <= event.at < math.inf:
            raise InvalidEvent(f"{event!r} is before {self.view.now} or never")
        commands = transition(self, event)
        if self.observer is not None:
            self._show(self.observer, event, commands)
        return commands

    def _show(
        self,
        observer: Callable[[Event | Command], object],
        event: Event,
        commands: list[Command],
    ) -> None:
        """Let *observer* see; the commands are due, whatever it raises."""
        try:
            observer(event)
            for command in commands:
                observer(command)
        except Exception:
            _log.exception("the observer failed on %r", event)

    def verdict(self, request: Request) -> Verdict:
        """Say what would become of *request* if it came now; nothing changes.

        Its `outcome` is "reject" if the balancer refuses it, "admit" if it would
        be sent to a worker at once, and "queue" if it would wait, or might.

        Raises:
            InvalidRequest: It cannot be served here; its subclasses say why.
            PolicyError: The balancer broke its contract.

        >>> Cluster().verdict(Request(id="r", prompt=[1, 2, 3])).outcome
        'queue'
        """
        self.check(request)
        if request.deadline <= self.view.now:
            return Verdict(False, "its deadline has passed")
        try:
            verdict = self.balancer.admit(request, self.view)
            queued = verdict.admitted and has_to_wait(self, request)
        except Exception as error:
            raise policy_error(self.balancer, error) from error
        return attrs.evolve(verdict, queued=queued) if queued else verdict

    def fork(self) -> Cluster:
        """Return a twin that goes its own way from here, with no observer.

        It has copies of the policies and of all state, so that what would
        happen can be tried, in `llmd.sim` for one.  Takes time and memory in
        proportion to the index and to what is in flight; requests and what
        workers said of themselves are shared, being frozen.
        """
        memo: dict[int, Any] = {id(self.observer): None}
        return copy.deepcopy(self, memo)

    def waits(self, id: RequestId) -> bool:
        """Say whether a request waits for a worker."""
        return id in self.waiting

    def runs(self, id: RequestId) -> Decision | None:
        """Return where a request runs, if it does."""
        booking = self.books.get(id)
        return None if booking is None else booking.decision
