"""One request on its way through a server: what its client waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import attrs

from ..decision import Decision
from ..errors import LlmdError
from ..types import Request
from .engine import Output

T = TypeVar("T")


class Interrupted(Exception):
    """The request was taken off its worker; look at the ticket."""


@attrs.define(eq=False)
class Ticket:
    """A request that a client waits for, from arrival to end.

    Attributes:
        request: It.
        retried: Whether it waits for another worker if it loses its own.
        decision: Where it runs now; None while it waits.
        failure: Why it ended, if it did not end well.
        streamed: Its client has seen part of the answer from this worker.
        said: Tokens of the answer so far, if it may have to be resumed; None
            once an engine hid what it said.
        ended: Nothing is booked for it any more.
    """

    request: Request
    retried: bool = True
    decision: Decision | None = None
    failure: LlmdError | None = None
    streamed: bool = False
    said: list[int] | None = attrs.field(factory=list)
    ended: bool = False
    _changed: asyncio.Event = attrs.field(factory=asyncio.Event, init=False)
    # Of what is awaited just now: the answer and, perhaps, its prefill.
    _scopes: set[asyncio.Timeout] = attrs.field(factory=set, init=False)

    def dispatch(self, decision: Decision) -> None:
        """Let the client go on to a worker."""
        self.decision = decision
        self._changed.set()

    def requeue(self) -> None:
        """Take the request off its worker; it waits again."""
        self.decision, self.streamed = None, False
        self._changed.clear()
        self._interrupt()

    def fail(self, error: LlmdError) -> None:
        """End the request with *error*."""
        self.failure, self.ended = error, True
        self._changed.set()
        self._interrupt()

    def note(self, output: Output) -> None:
        """Remember what was said, in case that another worker has to go on."""
        if not self.request.resumable or self.said is None:
            return
        if output.text and not output.token_ids:
            self.said = None
        else:
            self.said += output.token_ids

    def rest(self) -> Request | None:
        """Return what an engine is to be asked for; None if all is said."""
        request, said = self.request, self.said
        if not said:
            return request
        left = None
        if request.max_new_tokens is not None:
            left = request.max_new_tokens - len(said)
            if left < 1:
                return None
        prompt = request.prompt.extended(said)
        return attrs.evolve(request, prompt=prompt, max_new_tokens=left)

    async def placed(self) -> Decision:
        """Wait for a decision.

        Raises:
            LlmdError: The request failed instead.
        """
        while True:
            await self._changed.wait()
            if self.failure is not None:
                raise self.failure
            if self.decision is not None:
                return self.decision

    async def during(self, work: Awaitable[T]) -> T:
        """Await *work* unless the request is taken off its worker meanwhile.

        Raises:
            Interrupted: It was; *work* is cancelled.
        """
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._scopes.add(scope)
                return await work
        except TimeoutError:
            if scope.expired():
                raise Interrupted from None
            raise
        finally:
            self._scopes.discard(scope)

    def _interrupt(self) -> None:
        for scope in self._scopes:
            if not scope.expired():
                scope.reschedule(0.0)
