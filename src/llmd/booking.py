"""A request on a worker: what was booked for it, and when."""

from __future__ import annotations

import math

import attrs

from .decision import Decision
from .types import Request, WorkerId


@attrs.define(eq=False)
class Booking:
    """A request that was dispatched and has not ended; policies only read it.

    Attributes:
        request: It.
        decision: Where it runs.
        prefill_tokens: Prompt tokens booked on `decision.first`, 0 once done.
        context_tokens: Prompt and output tokens booked on `decision.decode`.
        generated_tokens: Of the answer so far, by earlier workers too.
        uncached_tokens: Prompt tokens that were to be computed, by the index.
        since: When the request arrived, seconds.
        attempts: Dispatches of it that failed before this one.
        dispatched_at: When this one began, seconds.
        first_token_at: When its answer began; NaN before.
        last_token_at: When it last generated; during the hook `generated`,
            the time before that.  NaN before the first.
        prefilled: The prompt is computed.
        streamed: Its client has seen part of the answer, from here.
        failed_on: Workers on which it was dispatched before and failed.
        again: It was dispatched before, and taken back or lost.
        number: Its place in the order of arrival, which it keeps.
        serial: Its place in the order of dispatch.
        booked: It is in the books; false while the cluster tries what would be
            if it were not.

    >>> booking = Booking(Request(id="r", prompt=[1]), Decision("a"), 1, 1)
    >>> booking.workers
    ('a',)
    """

    request: Request
    decision: Decision
    prefill_tokens: int
    context_tokens: int
    generated_tokens: int = attrs.field(default=0, kw_only=True)
    uncached_tokens: int = 0
    since: float = math.nan
    attempts: int = 0
    dispatched_at: float = math.nan
    first_token_at: float = math.nan
    last_token_at: float = math.nan
    prefilled: bool = False
    streamed: bool = False
    failed_on: frozenset[WorkerId] = frozenset()
    again: bool = False
    number: int | None = None
    serial: int = 0
    booked: bool = False

    @property
    def workers(self) -> tuple[WorkerId, ...]:
        """The workers that hold something of it."""
        decode, prefill = self.decision.decode, self.decision.prefill
        if prefill is None or prefill == decode or self.prefilled:
            return (decode,)
        return (prefill, decode)
