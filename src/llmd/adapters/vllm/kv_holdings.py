"""What one publisher's engine holds, and reports on the way to be told."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, TypeAlias

import attrs
import numpy as np

from ...errors import InvalidSnapshot
from ...events import BlocksCleared, BlocksRemoved, BlocksStored
from ...hashing import Hashes
from ...types import Tier, WorkerId

Report: TypeAlias = BlocksStored | BlocksRemoved | BlocksCleared
Table: TypeAlias = dict[Any, tuple[int, int]]


_PLAIN = ("expected", "live", "most", "block_tokens", "group", "window")
_MAGIC = b"llmd decoder 1\n"
_SUM_BYTES = 16


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

    def state(self) -> dict[str, Any]:
        """Return all of it, for `of`, in what msgpack takes."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        copies = [[int(tier), key, more] for (tier, key), more in self.copies.items()]
        held = [[[key, *entry] for key, entry in table.items()] for table in self.held]
        return {**plain, "copies": copies, "held": held}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Holdings:
        """Return the holdings that gave *state*."""
        tables = state["held"]
        return cls(
            held=tuple({key: (name, end) for key, name, end in t} for t in tables),
            copies={(Tier(tier), key): more for tier, key, more in state["copies"]},
            **{name: state[name] for name in _PLAIN},
        )

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

    def known(self, keys: Iterable[Any]) -> Table:
        """Return the entries of those of *keys* that some tier holds."""
        return {key: entry for key in keys if (entry := self.entry(key))}

    def add(self, tier: Tier, table: Table) -> None:
        """Hold another copy of each block of *table*."""
        held = self.held[tier]
        for key, entry in table.items():
            if key in held:
                self.copies[tier, key] = self.copies.get((tier, key), 0) + 1
            held[key] = entry
        if len(held) > self.most:
            self.most = len(held)

    def add_one(self, tier: Tier, key: Any, entry: tuple[int, int]) -> None:
        """Hold another copy of one block."""
        held = self.held[tier]
        if key in held:
            self.copies[tier, key] = self.copies.get((tier, key), 0) + 1
        held[key] = entry
        if len(held) > self.most:
            self.most = len(held)

    def take(self, tier: Tier, key: Any) -> tuple[int, int] | None:
        """Drop one copy; return its entry if it was the last."""
        if self.copies and (more := self.copies.get((tier, key))):
            if more > 1:
                self.copies[tier, key] = more - 1
            else:
                del self.copies[tier, key]
            return None
        return self.held[tier].pop(key, None)


class Run:
    """Collects reports, and neighbours of one kind into one."""

    __slots__ = ("at", "kind", "parts", "reports", "window", "worker")

    def __init__(self, worker: WorkerId, at: float, window: int) -> None:
        self.worker, self.at, self.window = worker, at, window
        self.reports: list[Report] = []
        self.kind: tuple[type[Report], Tier, int] | None = None
        self.parts: list[Hashes] = []

    def add(
        self, report: type[Report], tier: Tier, block_tokens: int, hashes: Hashes
    ) -> None:
        """Take in a part of a report; an empty one is none."""
        kind = report, tier, block_tokens
        if kind != self.kind:
            if self.parts:
                self.flush()
            self.kind = kind
        if len(hashes):
            self.parts.append(hashes)

    def flush(self) -> None:
        """End the report under way, if there is any."""
        parts = self.parts
        if self.kind is None or not parts:
            return
        report, tier, block_tokens = self.kind
        hashes = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if report is BlocksStored:
            stored = BlocksStored(
                self.at, self.worker, hashes, block_tokens, tier, self.window
            )
            self.reports.append(stored)
        else:
            self.reports.append(BlocksRemoved(self.at, self.worker, hashes, tier))
        self.parts = []


def named(names: Iterable[int]) -> Hashes:
    """Return *names* as an array."""
    return np.array([*names], dtype=np.uint64)


def sealed(body: bytes) -> bytes:
    """Return *body* with a version before it and a checksum behind."""
    body = _MAGIC + body
    return body + hashlib.blake2b(body, digest_size=_SUM_BYTES).digest()


def unsealed(data: bytes) -> bytes:
    """Return what `sealed` took.

    Raises:
        InvalidSnapshot: It is damaged, or of another version.
    """
    body, checksum = data[:-_SUM_BYTES], data[-_SUM_BYTES:]
    if not body.startswith(_MAGIC):
        raise InvalidSnapshot("this is no decoder of this version")
    if hashlib.blake2b(body, digest_size=_SUM_BYTES).digest() != checksum:
        raise InvalidSnapshot("the checksum does not fit: the dump is damaged")
    return body[len(_MAGIC) :]
