"""A booking for servers that call engines themselves."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import attrs

from .. import events as e
from ..decision import Decision
from ..types import Request, WorkerId
from .engine import Engine
from .ticket import Ticket

if TYPE_CHECKING:
    from .server import Server


@attrs.define(eq=False)
class Lease:
    """Load booked for one request from entry to exit, whatever happens inside.

    Entering waits for a worker.  Leaving releases it: as an end in full, as an
    error, or as a cancel, by how the block is left.  A worker that is lost
    meanwhile ends the lease; the block's own call to the engine will fail.

        async with server.lease(request) as lease:
            answer = await call(lease.worker)
            lease.first_token()
    """

    request: Request
    _server: Server
    _ticket: Ticket | None = attrs.field(default=None, init=False)
    _decision: Decision | None = attrs.field(default=None, init=False)

    @property
    def decision(self) -> Decision:
        """Where the request was placed, and why.

        Raises:
            RuntimeError: The lease is not entered.
        """
        if self._decision is None:
            raise RuntimeError("the lease is not entered")
        return self._decision

    @property
    def worker(self) -> WorkerId:
        """The worker that answers."""
        return self.decision.decode

    @property
    def engine(self) -> Engine:
        """Its engine."""
        return self._server.engine(self.worker)

    @property
    def lost(self) -> bool:
        """Whether the booking ended before the block did."""
        return self._ticket is not None and self._ticket.ended

    def first_token(self, cached_tokens: int | None = None) -> None:
        """Say that the answer began; the prompt's load is released."""
        if not self.lost:
            event = e.FirstToken(
                self._server.clock(), self.worker, self.request.id, cached_tokens
            )
            self._server.handle(event)

    def generated(self, tokens: int) -> None:
        """Say that *tokens* more were generated, the first not counted."""
        if not self.lost:
            event = e.TokensGenerated(
                self._server.clock(), self.worker, self.request.id, tokens
            )
            self._server.handle(event)

    async def __aenter__(self) -> Lease:
        self._ticket = self._server.enter(self.request, retried=False)
        try:
            self._decision = await self._ticket.placed()
        except BaseException:
            self._server.leave(self._ticket)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._ticket is not None
        if kind is None:
            self._server.end(self._ticket)
        self._server.leave(self._ticket)
