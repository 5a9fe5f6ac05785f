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
        cached_tokens: Prompt tokens found in a cache, and not computed by anybody.
        prefill_cached: Those that the other worker found, if one computes it.
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
    cached_tokens: int = 0
    prefill_cached: int | None = None
    generated: int = 0
    attempts: int = 0
    status: str = ""

    def found(self, cached_tokens: int | None) -> None:
        """Note what who answers found: KV that was handed over was computed first."""
        counts = [n for n in (cached_tokens, self.prefill_cached) if n is not None]
        self.cached_tokens = min(counts, default=0)
