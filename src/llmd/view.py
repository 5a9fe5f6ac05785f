"""What a policy may see: one consistent, read-only moment of a cluster.

The columns of `Workers` are live: the cluster updates them in place, so a
decision costs no copying.  A policy that keeps a column past its own call
must copy it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from .types import Request, RequestId, Role, State, Worker, WorkerId

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]

LOADS = ("running_requests", "waiting_requests", "prefill_tokens", "context_tokens")
"""The columns of a worker that a router books on, in the order of `Workers.loads`."""

_DERIVED_KEPT = 64

_READY = frozenset({State.READY})
_SUPPLY = frozenset({State.STARTING, State.LOADING, State.WARMING, State.READY})


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
        loads: Running and waiting requests, prefill and context tokens, one
            below the other, (4, W).
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
    loads: Ints = attrs.field()
    _derived: dict[Hashable, NDArray[Any]] = attrs.field(
        factory=dict, init=False, repr=False
    )
    _served: dict[tuple[str, str], bool] = attrs.field(
        factory=dict, init=False, repr=False
    )
    _beside: dict[str, frozenset[str] | None] = attrs.field(
        factory=dict, init=False, repr=False
    )

    @loads.default
    def _stacked(self) -> Ints:
        return np.array([getattr(self, name) for name in LOADS], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def kv_tokens(self) -> Ints:
        """Tokens the KV cache of each holds, shape (W,)."""
        return self.kv_blocks * self.block_tokens

    def able(self, role: Role) -> Mask:
        """Say which workers can do *role*, shape (W,)."""
        return self.derived(role, _able)

    def derived(
        self, key: Hashable, make: Callable[[Workers, Any], NDArray[Any]]
    ) -> NDArray[Any]:
        """Return ``make(workers, key)``, (W,), asked once for each *key*.

        For what follows from the facts alone, which stay as they are for the
        life of this object: machines, places, prices.
        """
        found = self._derived.get(key)
        if found is None:
            if len(self._derived) >= _DERIVED_KEPT:
                self._derived.clear()
            found = self._derived[key] = make(self, key)
        return found

    def ready(self) -> Mask:
        """Say which workers are ready for requests, shape (W,)."""
        return self.within(_READY)

    def supply(self) -> Mask:
        """Say which workers are ready or on their way there, shape (W,)."""
        return self.within(_SUPPLY)

    def within(self, states: frozenset[State]) -> Mask:
        """Say which workers are in one of *states*, shape (W,)."""
        return self.derived(states, _within)

    def serve(self, model: str, lora: str = "") -> bool:
        """Say whether a worker is ready for requests for *model* with *lora*."""
        served, key = self._served, (model, lora)
        if key not in served:
            if len(served) >= _DERIVED_KEPT:
                served.clear()
            ready = zip(self.facts, self.states, strict=True)
            served[key] = any(s in _READY and w.serves(model, lora) for w, s in ready)
        return served[key]

    def models_beside(self, model: str) -> frozenset[str] | None:
        """Return *model* and those that compete with it for some worker.

        None if all do: it names no model, or a worker serves any.
        """
        beside = self._beside
        if model not in beside:
            if len(beside) >= _DERIVED_KEPT:
                beside.clear()
            serving = [w.models for w in self.facts if w.serves(model)]
            all_do = not model or not all(serving)
            beside[model] = None if all_do else frozenset({model, ""}.union(*serving))
        return beside[model]

    def only(self, rows: Ints) -> Workers:
        """Return the given rows, each column copied when it is first read.

        They show the moment they are read in, so a policy that is asked while
        the cluster stands still sees one moment.
        """
        part = object.__new__(_Part)
        object.__setattr__(part, "_whole", self)
        object.__setattr__(part, "_picked", rows)
        return part


def _able(workers: Workers, role: Role) -> Mask:
    return np.array([role in worker.role for worker in workers.facts], dtype=np.bool_)


def _within(workers: Workers, states: frozenset[State]) -> Mask:
    return np.array([state in states for state in workers.states], dtype=np.bool_)


class _Part(Workers):
    """Some workers of another table, whose columns are made when asked for."""

    __slots__ = ("_picked", "_whole")

    def derived(
        self, key: Hashable, make: Callable[[Workers, Any], NDArray[Any]]
    ) -> NDArray[Any]:
        whole: Workers = self._whole
        part: NDArray[Any] = whole.derived(key, make)[self._picked]
        return part

    def serve(self, model: str, lora: str = "") -> bool:
        whole: Workers = self._whole
        return whole.serve(model, lora)

    def models_beside(self, model: str) -> frozenset[str] | None:
        whole: Workers = self._whole
        return whole.models_beside(model)

    def __getattr__(self, name: str) -> Any:
        # Reached only while the attribute of this name is not set.
        if name in COLUMNS:
            value = getattr(self._whole, name)[self._picked]
        elif name == "loads":
            value = np.take(self._whole.loads, self._picked, axis=1)
        elif name in ("ids", "facts", "states"):
            whole = getattr(self._whole, name)
            value = tuple([whole[row] for row in self._picked.tolist()])
        else:
            raise AttributeError(name)
        object.__setattr__(self, name, value)
        return value


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

    def tokens_before(self, request: Request, view: View) -> int:
        """Sum of the prompts that would be sent before *request*, at most."""

    def tokens_ahead(self, request: Request, view: View) -> int:
        """Sum of the prompts expected to be sent before *request*."""

    def of_model(self, model: str) -> int:
        """Count those for *model*."""

    def tokens_of(self, models: Collection[str] | None) -> int:
        """Sum of the prompts for any of *models*; None for all."""

    def group_of(self, request: Request) -> Hashable:
        """Return what keeps *request* apart whatever a balancer says."""

    def since(self, id: RequestId) -> float | None:
        """Return when a waiting request arrived; None if it does not wait."""


@attrs.define(eq=False)
class Totals:
    """What has come and gone since the cluster was made.

    Attributes:
        requests: That arrived and were admitted.
        prompt_tokens: Of these.
        uncached_tokens: Prompt tokens of dispatched requests that had to be
            computed, each dispatch counted.
        ended_requests: That were answered in full.
        generated_tokens: In all answers.
    """

    requests: int = 0
    prompt_tokens: int = 0
    uncached_tokens: int = 0
    ended_requests: int = 0
    generated_tokens: int = 0


@attrs.define(eq=False)
class View:
    """Everything a policy may base a decision on.

    Attributes:
        now: Current time, seconds.
        rng: The only source of randomness a policy may use.
        workers: The fleet, W workers.
        waiting: Requests not yet dispatched.
        totals: What has come and gone, over all workers.
        lane: To an order that is asked for a place: what the balancers above it
            tell apart.
    """

    now: float
    rng: np.random.Generator
    workers: Workers
    waiting: Waiting
    totals: Totals = attrs.field(factory=Totals, kw_only=True)
    lane: Hashable = attrs.field(default=(), kw_only=True)
    _match: Callable[[Request, Sequence[WorkerId], float], Ints] = attrs.field(
        alias="match"
    )
    _serving: Callable[[Request], Mask] | None = attrs.field(
        default=None, alias="serving"
    )
    _whole: View | None = attrs.field(default=None, alias="whole")
    _rows: Ints | None = attrs.field(default=None, alias="rows")
    _matched: tuple[Request | None, Ints | None] = attrs.field(
        default=(None, None), init=False
    )

    def only(self, mask: Mask) -> View:
        """Return the same view of the workers where *mask*, (W,), is true."""
        if np.count_nonzero(mask) == len(mask):
            return self
        rows = np.flatnonzero(mask)
        return View(
            now=self.now,
            rng=self.rng,
            workers=self.workers.only(rows),
            waiting=self.waiting,
            totals=self.totals,
            match=self._match,
            whole=self,
            rows=rows,
        )

    def seen(self, waiting: Waiting | None = None, lane: Hashable = ()) -> View:
        """Return the same view with other requests waiting, or of a lane."""
        twin = object.__new__(View)
        for name in _VIEW:
            setattr(twin, name, getattr(self, name))
        twin.lane = lane
        if waiting is not None:
            twin.waiting = waiting
        return twin

    def able(self, request: Request) -> View:
        """Return the view of the workers of all that can serve *request* now."""
        whole = self if self._whole is None else self._whole
        if whole._serving is None:
            return whole.only(whole.workers.ready())
        return whole.only(whole._serving(request))

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


_VIEW = tuple([field.name for field in attrs.fields(View)])
