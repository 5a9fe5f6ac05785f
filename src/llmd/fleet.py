"""The cluster's table of workers: columns it writes and policies read."""

from __future__ import annotations

import bisect
from typing import Any

import attrs
import numpy as np

from .events import SignalsReported
from .types import State, Worker, WorkerId
from .view import COLUMNS, LOADS, Mask, Workers

# Such a worker joined before its engine could say what it serves.
_UNKNOWN = (State.STARTING, State.LOADING)
_STATIC = ("kv_blocks", "block_tokens", "max_running", "max_model_tokens")


@attrs.define(eq=False)
class Fleet:
    """Workers in id order, one row each.

    `workers` shows the same memory read-only.  A join or a leave lays the
    table anew in O(W); everything else changes it in place.
    """

    workers: Workers = attrs.field(init=False)
    columns: dict[str, Any] = attrs.field(init=False)
    _limits: list[int] = attrs.field(factory=list, init=False)
    _rows: dict[WorkerId, int] = attrs.field(factory=dict, init=False)
    _serving: dict[tuple[str, str, int], Mask] = attrs.field(factory=dict, init=False)
    _longest: dict[str, int] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self.columns = {name: np.empty(0, dtype=kind) for name, kind in COLUMNS.items()}
        self._show((), ())

    def __contains__(self, worker: WorkerId) -> bool:
        return worker in self._rows

    def __deepcopy__(self, memo: dict[int, Any]) -> Fleet:
        # The columns that policies read are views of those written here, which
        # copying one by one would tear apart.
        twin = Fleet()
        twin.columns = {name: column.copy() for name, column in self.columns.items()}
        twin._show(self.workers.facts, self.workers.states)
        memo[id(self)] = twin
        memo[id(self.workers)] = twin.workers
        return twin

    def row(self, worker: WorkerId) -> int | None:
        """Return the worker's row, if it is there."""
        return self._rows.get(worker)

    def add(self, row: int, column: str, amount: int) -> None:
        """Change one cell."""
        self.columns[column][row] += amount

    def join(self, worker: Worker) -> None:
        """Add a row for *worker*."""
        row = int(np.searchsorted(self.workers.ids, worker.id)) if self._rows else 0
        for name, kind in COLUMNS.items():
            empty = getattr(worker, name) if name in _STATIC else 0
            if kind is np.float64:
                empty = np.nan
            self.columns[name] = np.insert(self.columns[name], row, empty)
        facts, states = self.workers.facts, self.workers.states
        self._show(
            (*facts[:row], worker, *facts[row:]),
            (*states[:row], worker.state, *states[row:]),
        )

    def leave(self, worker: WorkerId) -> None:
        """Take away the worker's row."""
        row = self._rows[worker]
        for name in COLUMNS:
            self.columns[name] = np.delete(self.columns[name], row)
        facts, states = self.workers.facts, self.workers.states
        self._show(facts[:row] + facts[row + 1 :], states[:row] + states[row + 1 :])

    def change(
        self, worker: WorkerId, state: State | None, anew: Worker | None, **facts: Any
    ) -> None:
        """Change what is known of *worker*; None leaves a fact as it is."""
        row = self._rows[worker]
        known, states = list(self.workers.facts), list(self.workers.states)
        if anew is not None:
            known[row], states[row] = anew, anew.state
            for name in _STATIC:
                self.columns[name][row] = getattr(anew, name)
        new = {name: value for name, value in facts.items() if value is not None}
        known[row] = attrs.evolve(known[row], **new)
        states[row] = state or states[row]
        self._show(tuple(known), tuple(states))

    def report(self, row: int, event: SignalsReported) -> None:
        """Write down what an engine says of itself."""
        columns, signals = self.columns, event.signals
        columns["reported_waiting"][row] = signals.waiting_requests
        columns["reported_running"][row] = signals.running_requests
        columns["reported_kv_usage"][row] = signals.kv_usage
        measured = event.measured_at
        columns["reported_at"][row] = event.at if measured != measured else measured

    def serving(self, model: str, lora: str, tokens: int) -> Mask:
        """Say which are ready to serve *model* with *lora* at that length, (W,)."""
        key = model, lora, self.fit(tokens)
        mask = self._serving.get(key)
        if mask is None:
            mask = self._serves(model, lora) & self.workers.ready()
            mask &= self.workers.max_model_tokens >= tokens
            if len(self._serving) >= 4096:
                self._serving.clear()
            self._serving[key] = mask
        return mask

    @property
    def limits(self) -> tuple[int, ...]:
        """The distinct lengths, in tokens, that ready workers take."""
        return tuple(self._limits)

    def fit(self, tokens: int) -> int:
        """Return the size class of a request: how many limits are too short."""
        return bisect.bisect_left(self._limits, tokens)

    def knows(self, lora: str) -> bool:
        """Say whether any worker has the adapter."""
        return any(lora in worker.loras for worker in self.workers.facts)

    def longest(self, model: str) -> int | None:
        """Return the most tokens any worker of *model* takes; None of no worker."""
        if model not in self._longest:
            known = [state not in _UNKNOWN for state in self.workers.states]
            serving = self._serves(model, "") & np.array(known, dtype=np.bool_)
            limits = self.workers.max_model_tokens[serving]
            if not len(limits):
                return None
            self._longest[model] = int(limits.max())
        return self._longest[model]

    def may_serve(self, model: str, lora: str = "", tokens: int = 1) -> bool:
        """Say whether a worker serves this, or may once it has started or woken."""
        for worker, state in zip(self.workers.facts, self.workers.states, strict=True):
            if state in _UNKNOWN and worker.serves(model):
                return True
            if state is not State.DRAINING and worker.serves(model, lora, tokens):
                return True
        return False

    def _serves(self, model: str, lora: str) -> Mask:
        serves = [worker.serves(model, lora) for worker in self.workers.facts]
        return np.array(serves, dtype=np.bool_)

    def _show(self, facts: tuple[Worker, ...], states: tuple[State, ...]) -> None:
        loads = np.array([self.columns[name] for name in LOADS], dtype=np.int64)
        self.columns.update(zip(LOADS, loads, strict=True))
        shown: dict[str, Any] = {"loads": loads.view()}
        shown["loads"].flags.writeable = False
        for name, column in self.columns.items():
            shown[name] = column.view()
            shown[name].flags.writeable = False
        ids = tuple([worker.id for worker in facts])
        self.workers = Workers(ids=ids, facts=facts, states=states, **shown)
        self._rows = {worker: row for row, worker in enumerate(ids)}
        self._limits = sorted(
            set(self.workers.max_model_tokens[self.workers.ready()].tolist())
        )
        self._serving.clear()
        self._longest.clear()
