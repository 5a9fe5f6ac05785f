"""What a policy may see: one consistent, read-only moment of a cluster.

The columns of `Workers` are live: the cluster updates them in place, so a
decision costs no copying.  A policy that keeps a column past its own call
must copy it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from .types import Request, RequestId, Role, State, Worker, WorkerId

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]


@attrs.frozen(eq=False, kw_only=True)
class Workers:
    """The workers of a cluster in columns, each of shape (W,), in id order.

    Attributes:
        ids: Worker ids, sorted.
        facts: What each said of itself when it joined or changed.
        states: How far each is in its life.
        kv_blocks: Blocks in its KV cache.
        block_tokens: Tokens a block.
        max_running: Requests it batches at once.
        max_model_tokens: Prompt and output together, at most.
        running_requests: Dispatched there and not ended.
        waiting_requests: Those of them with no first token yet.
        prefill_tokens: Prompt tokens dispatched there and not yet computed,
            cached ones not counted.
        context_tokens: Prompt and output tokens of its running requests.
        reported_waiting: The engine's own count of queued requests, or NaN.
        reported_running: The engine's own count of batched requests, or NaN.
        reported_kv_usage: The engine's own KV usage in [0, 1], or NaN.
        reported_at: When it measured these, or NaN.
    """

    ids: tuple[WorkerId, ...]
    facts: tuple[Worker, ...]
    states: tuple[State, ...]
    kv_blocks: Ints
    block_tokens: Ints
    max_running: Ints
    max_model_tokens: Ints
    running_requests: Ints
    waiting_requests: Ints
    prefill_tokens: Ints
    context_tokens: Ints
    reported_waiting: Floats
    reported_running: Floats
    reported_kv_usage: Floats
    reported_at: Floats
    _able: dict[Role, Mask] = attrs.field(factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def kv_tokens(self) -> Ints:
        """Tokens the KV cache of each holds, shape (W,)."""
        return self.kv_blocks * self.block_tokens

    def able(self, role: Role) -> Mask:
        """Say which workers can do *role*, shape (W,)."""
        mask = self._able.get(role)
        if mask is None:
            able = [role in worker.role for worker in self.facts]
            mask = self._able[role] = np.array(able, dtype=np.bool_)
        return mask

    def ready(self) -> Mask:
        """Say which workers are ready for requests, shape (W,)."""
        return np.array([state is State.READY for state in self.states], dtype=np.bool_)

    def only(self, rows: Ints) -> Workers:
        """Return copies of the given rows."""
        picked = rows.tolist()
        return Workers(
            ids=tuple([self.ids[row] for row in picked]),
            facts=tuple([self.facts[row] for row in picked]),
            states=tuple([self.states[row] for row in picked]),
            **{name: getattr(self, name)[rows] for name in COLUMNS},
        )


COLUMNS: dict[str, type] = {
    "kv_blocks": np.int64,
    "block_tokens": np.int64,
    "max_running": np.int64,
    "max_model_tokens": np.int64,
    "running_requests": np.int64,
    "waiting_requests": np.int64,
    "prefill_tokens": np.int64,
    "context_tokens": np.int64,
    "reported_waiting": np.float64,
    "reported_running": np.float64,
    "reported_kv_usage": np.float64,
    "reported_at": np.float64,
}


class Waiting(Protocol):
    """The requests not yet dispatched, as a policy may look at them."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]:
        """Yield the requests, in order within each flow."""

    @property
    def prompt_tokens(self) -> int:
        """Sum of their prompts."""

    def of_model(self, model: str) -> int:
        """Count those for *model*."""

    def since(self, id: RequestId) -> float | None:
        """Return when a waiting request arrived; None if it does not wait."""


@attrs.define(eq=False)
class View:
    """Everything a policy may base a decision on.

    Attributes:
        now: Current time, seconds.
        rng: The only source of randomness a policy may use.
        workers: The fleet, W workers.
        waiting: Requests not yet dispatched.
    """

    now: float
    rng: np.random.Generator
    workers: Workers
    waiting: Waiting
    _match: Callable[[Request, Sequence[WorkerId], float], Ints] = attrs.field(
        alias="match"
    )
    _whole: View | None = attrs.field(default=None, alias="whole")
    _rows: Ints | None = attrs.field(default=None, alias="rows")
    _matched: tuple[Request | None, Ints | None] = attrs.field(
        default=(None, None), init=False
    )

    def only(self, mask: Mask) -> View:
        """Return the same view of the workers where *mask*, (W,), is true."""
        rows = np.flatnonzero(mask)
        if len(rows) == len(self.workers):
            return self
        return View(
            now=self.now,
            rng=self.rng,
            workers=self.workers.only(rows),
            waiting=self.waiting,
            match=self._match,
            whole=self,
            rows=rows,
        )

    def cached_tokens(self, request: Request) -> Ints:
        """Prompt tokens of *request* that each worker holds, shape (W, tiers).

        Column t counts the leading run found in tier t or a faster one, so
        rows never decrease.  Asked twice for one request, it answers from
        memory.
        """
        if self._whole is not None:
            return self._whole.cached_tokens(request)[self._rows]
        asked, found = self._matched
        if found is None or asked is not request:
            found = self._match(request, self.workers.ids, self.now)
            self._matched = (request, found)
        return found

    def uncached_tokens(self, request: Request) -> Ints:
        """Prompt tokens that each worker would have to compute, shape (W,).

        Tokens in any tier count as held, except that the last token of a
        prompt is always computed.
        """
        held = self.cached_tokens(request)[:, -1]
        return np.maximum(request.prompt_tokens - held, 1)

    def advance(self, now: float) -> None:
        """Move to *now*; what was matched before may have changed."""
        self.now = now
        self._matched = (None, None)
