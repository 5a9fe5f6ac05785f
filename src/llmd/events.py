"""What happens to a cluster.  Every event says when, in `at`.

Events about a worker or a request that is gone are late, not wrong: a cluster
ignores them.  Ids are never used twice, so a late event cannot be mistaken;
only of a request that is back on the worker it was taken from, a driver must
not report what the first try did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs

from .hashing import Hashes
from .types import (
    Load,
    Request,
    RequestId,
    Role,
    Signals,
    State,
    Tier,
    Worker,
    WorkerId,
)


@attrs.frozen
class Event:
    """Something that happened.

    Attributes:
        at: When, in seconds on the driver's clock; never runs backwards.
    """

    at: float


@attrs.frozen
class RequestArrived(Event):
    """A client wants an answer."""

    request: Request


@attrs.frozen
class RequestCancelled(Event):
    """The client of a request went away."""

    request_id: RequestId


@attrs.frozen
class PrefillEnded(Event):
    """*worker* computed the prompt for another worker that will decode it.

    Attributes:
        cached_tokens: Prompt tokens it did not compute, by its own count.
    """

    worker: WorkerId
    request_id: RequestId
    cached_tokens: int | None = None


@attrs.frozen
class FirstToken(Event):
    """*worker* began to answer.

    Attributes:
        cached_tokens: Prompt tokens it did not compute, by its own count.
    """

    worker: WorkerId
    request_id: RequestId
    cached_tokens: int | None = None


@attrs.frozen
class TokensGenerated(Event):
    """*worker* generated *tokens* more, the first one not counted."""

    worker: WorkerId
    request_id: RequestId
    tokens: int


@attrs.frozen
class RequestEnded(Event):
    """*worker* holds the request no more.

    Attributes:
        error: What went wrong, in words; None for an answer in full.
    """

    worker: WorkerId
    request_id: RequestId
    error: str | None = None


@attrs.frozen
class WorkerJoined(Event):
    """A worker is there; one that restarts joins under a new id."""

    worker: Worker


@attrs.frozen
class WorkerChanged(Event):
    """A worker's state, role, models or adapters changed; None: as before.

    Attributes:
        facts: All of it anew, in place of what it said when it joined; given
            when an engine that joined while starting knows what it can do.
    """

    worker: WorkerId
    state: State | None = None
    role: Role | None = None
    models: frozenset[str] | None = None
    loras: frozenset[str] | None = None
    facts: Worker | None = None


@attrs.frozen
class WorkerLeft(Event):
    """A worker is gone, and all it was doing with it.

    Attributes:
        replaced: What only it could serve waits for another.  If not, that
            fails with `WorkerLost`, and models that nobody else serves and no
            `ModelAdded` welcomed are forgotten.
    """

    worker: WorkerId
    replaced: bool = True


@attrs.frozen
class ModelAdded(Event):
    """Requests for *model* are welcome, though perhaps no worker has it yet."""

    model: str


@attrs.frozen
class ModelRemoved(Event):
    """No more requests for *model*; those that wait are refused."""

    model: str


@attrs.frozen(eq=False)
class BlocksStored(Event):
    """*worker* holds more prefixes.

    Attributes:
        hashes: Names of the prefixes, shape (n,), as `Request.hashes` gives.
        block_tokens: Tokens a block, by the engine's own word.
        window_tokens: These blocks are read by sliding-window layers alone,
            which look back this far; 0 if a block counts only behind all
            before it.
    """

    worker: WorkerId
    hashes: Hashes
    block_tokens: int
    tier: Tier = Tier.GPU
    window_tokens: int = 0


@attrs.frozen(eq=False)
class BlocksRemoved(Event):
    """*worker* dropped prefixes, shape (n,)."""

    worker: WorkerId
    hashes: Hashes
    tier: Tier = Tier.GPU


@attrs.frozen
class BlocksCleared(Event):
    """*worker* dropped its whole cache, or what it holds became unknown.

    Attributes:
        reason: In words, for diagnosis; empty if the engine asked for it.
        unknown: The cache is not empty; events were missed, so that what was
            told before says nothing any more.
    """

    worker: WorkerId
    reason: str = ""
    unknown: bool = False


@attrs.frozen
class SignalsReported(Event):
    """*worker* told how it is.

    Attributes:
        measured_at: When it looked; `at` if not given.
    """

    worker: WorkerId
    signals: Signals
    measured_at: float = math.nan


@attrs.frozen(eq=False)
class PeerReported(Event):
    """Another router of the same fleet told all that it has booked.

    Attributes:
        peer: Its name, of this run of it.
        sequence: Its count of such reports; an older one changes nothing.
        loads: By worker; idle ones may be left out.
        valid_s: Seconds after which it counts no more, unless told again.
    """

    peer: str
    sequence: int
    loads: Mapping[WorkerId, Load]
    valid_s: float = 1.0


@attrs.frozen
class Tick(Event):
    """Time passed: deadlines, windows and the autoscaler look again."""
