"""What one publisher's engine holds, and reports on the way to be told."""

from __future__ import annotations

from typing import Any, TypeAlias

import attrs
import numpy as np

from ...events import BlocksCleared, BlocksRemoved, BlocksStored
from ...types import Tier, WorkerId

Report: TypeAlias = BlocksStored | BlocksRemoved | BlocksCleared
Table: TypeAlias = dict[Any, tuple[int, int]]


@attrs.define(eq=False)
class Holdings:
    """One publisher: where its sequence is, and what its engine holds.

    Attributes:
        expected: Number of the next batch to apply.
        live: Number of the last batch that did not come from a replay.
        held: For each tier, engine hash -> (name, tokens).
        copies: (tier, engine hash) -> copies beyond the first.
        most: Blocks of the fullest tier, at some time since this was last set.
        block_tokens: As the last event told.
        group: The cache group that is followed, once known.
        window: Tokens its layers look back; 0 if all.
    """

    expected: int = 0
    live: int = -1
    held: tuple[Table, ...] = attrs.field(factory=lambda: tuple({} for _ in Tier))
    copies: dict[tuple[Tier, Any], int] = attrs.field(factory=dict)
    most: int = 0
    block_tokens: int = 1
    group: int | None = None
    window: int = 0

    def drop(self) -> None:
        self.copies.clear()
        for table in self.held:
            table.clear()
        self.most = 0

    def entry(self, key: Any) -> tuple[int, int] | None:
        """Return (name, tokens) of an engine's hash, whatever tier holds it."""
        entry = self.held[0].get(key)
        if entry is None:
            for table in self.held[1:]:
                if entry := table.get(key):
                    break
        return entry

    def add(self, tier: Tier, table: Table) -> None:
        held = self.held[tier]
        if not held.keys().isdisjoint(table):
            for key in held.keys() & table:
                self.copies[tier, key] = self.copies.get((tier, key), 0) + 1
        held.update(table)
        self.most = max(self.most, len(held))

    def take(self, tier: Tier, key: Any) -> tuple[int, int] | None:
        """Drop one copy; return its entry if it was the last."""
        if self.copies and (more := self.copies.get((tier, key))):
            if more > 1:
                self.copies[tier, key] = more - 1
            else:
                del self.copies[tier, key]
            return None
        return self.held[tier].pop(key, None)


@attrs.define(eq=False)
class Run:
    """Collects reports, and neighbours of one kind into one."""

    worker: WorkerId
    at: float
    reports: list[Report] = attrs.field(factory=list)
    window: int = 0
    kind: tuple[type[Report], Tier, int] | None = None
    names: list[int] = attrs.field(factory=list)

    def add(
        self, report: type[Report], tier: Tier, block_tokens: int, names: list[int]
    ) -> None:
        kind = self.kind
        if not (
            kind and kind[0] is report and kind[1] is tier and kind[2] == block_tokens
        ):
            self.flush()
            self.kind = report, tier, block_tokens
        self.names += names

    def flush(self) -> None:
        if self.kind is None or not self.names:
            return
        report, tier, block_tokens = self.kind
        hashes = np.array(self.names, dtype=np.uint64)
        if report is BlocksStored:
            stored = BlocksStored(
                self.at, self.worker, hashes, block_tokens, tier, self.window
            )
            self.reports.append(stored)
        else:
            self.reports.append(BlocksRemoved(self.at, self.worker, hashes, tier))
        self.names = []
