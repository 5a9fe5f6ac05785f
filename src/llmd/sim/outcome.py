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
        cached_tokens: Prompt tokens found in a cache.
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
    generated: int = 0
    attempts: int = 0
    status: str = ""
