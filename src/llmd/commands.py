"""What a cluster asks its driver to do, in order."""

from __future__ import annotations

import attrs

from .decision import Decision
from .errors import LlmdError
from .recommendation import Recommendation
from .types import Request, RequestId, WorkerId


@attrs.frozen
class Command:
    """Something to be done."""


@attrs.frozen
class Dispatch(Command):
    """Send *request* where *decision* says."""

    request: Request
    decision: Decision


@attrs.frozen
class Requeue(Command):
    """The request lost its worker and waits again; tell its client nothing."""

    request: Request


@attrs.frozen
class Fail(Command):
    """The request ends with *error*; it holds nothing any more."""

    request: Request
    error: LlmdError = attrs.field(eq=repr)


@attrs.frozen
class Abort(Command):
    """Stop working on a request; its end needs no report."""

    worker: WorkerId
    request_id: RequestId


@attrs.frozen
class Scale(Command):
    """Have this many workers, starting or ready.

    Attributes:
        workers: How many.
        pool: Of which kind, by the autoscaler's name for it; empty for all.
        advice: Why.
    """

    workers: int
    pool: str = ""
    advice: Recommendation | None = attrs.field(default=None, eq=False)
