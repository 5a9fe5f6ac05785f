"""What became of one request."""

from __future__ import annotations

import math
from typing import Any

import attrs

from ..types import Request, WorkerId
from .workload import Job


def _asked(outcome: Any) -> Request:
    request: Request = outcome.job.request
    return request


@attrs.define(eq=False)
class Outcome:
    """The times of one request; NaN for what never happened.

    Attributes:
        job: What was asked.
        request: As it arrived.
        arrived: When it did, seconds.
        dispatched: When it was last sent to a worker.
        first: When its answer began.
        ended: When it ended, however.
        worker: That answered.
        prefill_worker: That computed its prompt, if another.
        found: Prompt tokens that who answers did not compute, by its own count.
        found_before: The fewest of a worker that computed it for another, or in
            vain, so that what it computed is in a cache now.
        generated: Tokens of the answer.
        attempts: Dispatches.
        status: `completed`, or in words why not; empty while unfinished.
    """

    job: Job
    request: Request = attrs.field(
        default=attrs.Factory(_asked, takes_self=True), repr=False
    )
    arrived: float = math.nan
    dispatched: float = math.nan
    first: float = math.nan
    ended: float = math.nan
    worker: WorkerId = ""
    prefill_worker: WorkerId = ""
    found: int | None = None
    found_before: int | None = None
    generated: int = 0
    attempts: int = 0
    status: str = ""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in a cache: KV that was handed over was computed."""
        counts = [n for n in (self.found, self.found_before) if n is not None]
        return min(counts, default=0)

    def also_found(self, cached_tokens: int | None) -> None:
        """Note what one found that computed the prompt for another, or in vain."""
        counts = [n for n in (cached_tokens, self.found_before) if n is not None]
        self.found_before = min(counts, default=None)
