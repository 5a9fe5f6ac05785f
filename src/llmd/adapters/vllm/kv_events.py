"""What vLLM publishes of its KV cache, as reports under our own names.

Theory.  A publisher (one for each data-parallel rank) numbers its batches from
0; a batch arrives as the frames ``[topic, sequence, payload]``, or from the
replay socket with an empty frame before them.  The payload is msgpack, an array
``[time, events, rank]``; releases differ in fields and in whether the outer
layer is an array or a map, so both are read and what is unknown is counted.

The engine's own block hashes are keys, never names: they depend on the process
and the release.  Token ids in `BlockStored` are hashed here, behind their
parent's name, so that a block is called what `llmd.types.Request.hashes` calls
it; a bounded table from the engine's hash to (name, tokens) serves parents and
removals.  vLLM does not merge equal blocks: it reports each copy, when it is
stored and when it is evicted, so a name leaves with its last copy.

Sequence numbers:

    live    seq <= last live one     the publisher restarted: forget all
    any     seq <  next              seen already through a replay: skip
    any     seq == next              apply
    live    seq >  next              `gap` says what to replay; feed it again
    replay, seq >  next              the batches between are lost: forget all
    final

A publisher that restarts and passes the last seen number before its first batch
gets here looks like a gap; who watches its process must call `forget`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import msgspec

from ...errors import InvalidSnapshot
from ...events import BlocksCleared, BlocksRemoved, BlocksStored
from ...hashing import Hasher, process_hasher, seed_of
from ...types import Tier, WorkerId
from .kv_fields import extras_of, tier_of
from .kv_holdings import Holdings, Report, Run, named, sealed, unsealed

END = b"\xff" * 8
"""The sequence frame that ends a replay."""

# Groups whose blocks hold the whole prefix; windows and state-space groups of
# hybrid models drop blocks that still count as cached.
_SLIDING = frozenset({"sliding_window", "sliding_window_mla"})
_WHOLE = frozenset({"full_attention", "mla_attention", "sink_full_attention"})
_GPU = Tier.GPU
_PLAIN: tuple[str, list[tuple[int, int, str]]] = "", []
_PREFIX_TOKENS = 1 << 22
_RANKS = 1 << 10
_BAD = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


@attrs.frozen
class Gap:
    """Batches [start, stop) of *rank* that did not arrive."""

    rank: int
    start: int
    stop: int


class KVEventDecoder:
    """Turns published batches into reports; does no I/O and has no clock.

    Args:
        worker: The id to report under.
        hasher: Gives the names; that of the process if not given.
        blocks_kept: Blocks of a rank that can be told apart; beyond it the
            oldest are reported removed, so what is reported stays true.

    >>> decoder = KVEventDecoder(WorkerId("a"))
    >>> event = {"type": "BlockStored", "block_hashes": [7, 8], "block_size": 2,
    ...     "parent_block_hash": None, "token_ids": [1, 2, 3, 4]}
    >>> payload = msgspec.msgpack.encode([0.5, [event], 0])
    >>> (stored,) = decoder.feed([b"", bytes(8), payload], at=1.0)
    >>> from llmd.blocks import Prompt
    >>> bool((stored.hashes == Prompt.of([1, 2, 3, 4]).hashes(2)).all())
    True
    """

    def __init__(
        self,
        worker: WorkerId,
        *,
        hasher: Hasher | None = None,
        blocks_kept: int = 1 << 20,
    ) -> None:
        self.worker = worker
        self.gap: Gap | None = None
        self.counts: Counter[str] = Counter()
        self._hasher = hasher or process_hasher()
        self._blocks_kept = blocks_kept
        self._ranks: dict[int, Holdings] = {}
        self._holders: tuple[Counter[int], ...] = ()

    def feed(
        self,
        frames: Sequence[bytes],
        at: float,
        *,
        replayed: bool = False,
        final: bool = False,
    ) -> list[Report]:
        """Take a batch and return what it tells, in order.

        With a gap before it, a live batch is not applied and `gap` is set:
        feed the replay from `gap.start` on, then this batch again as *final*.

        Args:
            frames: As received; `END` and garbage give nothing.
            at: Time of the reports.
            replayed: It comes from the replay socket.
            final: Apply it even though batches before it are lost.
        """
        self.gap = None
        try:
            sequence, rank_index, events = self._read(frames)
        except (msgspec.MsgspecError, *_BAD):
            self.counts["undecodable batches"] += 1
            return []
        if sequence < 0:
            return []
        rank = self._rank(rank_index)
        reports: list[Report] = []
        if not replayed and sequence <= rank.live:
            self.counts["restarts"] += 1
            rank.expected, rank.live = 0, -1
            reports += self._clear(rank, at, "the publisher restarted")
        if sequence > rank.expected:
            if not (replayed or final):
                self.gap = Gap(rank_index, rank.expected, sequence)
                return reports
            self.counts["lost batches"] += sequence - rank.expected
            lost = f"batches {rank.expected} to {sequence - 1} of rank {rank_index}"
            reports += self._clear(rank, at, f"{lost} are lost", unknown=True)
        if not replayed:
            rank.live = sequence
        if sequence < rank.expected:
            self.counts["repeated batches"] += 1
            return reports
        rank.expected = sequence + 1
        self.counts["batches"] += 1
        return reports + self.apply(events, at, rank_index)

    def apply(
        self, events: Sequence[Mapping[str, Any]], at: float, rank: int = 0
    ) -> list[Report]:
        """Return what decoded *events* tell, neighbours of a kind as one report."""
        state = self._rank(rank)
        run = Run(self.worker, at, state.window)
        for event in events:
            try:
                kind = event["type"]
                if kind == "BlockStored":
                    self._store(state, event, run)
                elif kind == "BlockRemoved":
                    self._remove(state, event, run)
                elif kind == "AllBlocksCleared":
                    run.flush()
                    run.reports += self._clear(state, at, "")
                else:
                    self.counts["unknown events"] += 1
            except _BAD:
                self.counts["malformed events"] += 1
        if state.most > self._blocks_kept:
            self._trim(state, run)
        run.flush()
        return run.reports

    def forget(self, at: float, reason: str) -> list[Report]:
        """Start over, as with a publisher never seen; return the report of it."""
        self._ranks.clear()
        self._holders = ()
        self.gap = None
        return [BlocksCleared(at, self.worker, reason)]

    def dump(self) -> bytes:
        """Return all that is known of the publisher, for `restore`; O(blocks).

        An index that another process restores needs it too: removals name
        blocks by the engine's hashes, which only this table can read.
        """
        ranks = {index: rank.state() for index, rank in self._ranks.items()}
        state = {"key": self._hasher.fingerprint, "ranks": ranks}
        return sealed(msgspec.msgpack.encode(state))

    def restore(self, data: bytes) -> None:
        """Go on where the decoder that `dump` made *data* of left off.

        What was published meanwhile comes by the replay that a stream begins
        with, or else shows as a gap.

        Raises:
            InvalidSnapshot: It is damaged, or its names are under another key.
        """
        state = msgspec.msgpack.decode(unsealed(data), strict=False)
        if state["key"] != self._hasher.fingerprint:
            raise InvalidSnapshot("the names are under another key than this process's")
        self._ranks = {
            int(index): Holdings.of(rank) for index, rank in state["ranks"].items()
        }
        self._holders = ()
        self.gap = None
        if len(self._ranks) > 1:
            self._count_holders()

    @staticmethod
    def _read(frames: Sequence[bytes]) -> tuple[int, int, Sequence[Any]]:
        """Return sequence number (-1: end of replay), rank and events."""
        if len(frames[-2]) != 8:
            raise ValueError("no sequence number")
        if frames[-2] == END:
            return -1, 0, ()
        batch = msgspec.msgpack.decode(frames[-1])
        if isinstance(batch, dict):
            events, rank = batch["events"], batch.get("data_parallel_rank")
        else:
            events, rank = batch[1], batch[2] if len(batch) > 2 else None
        rank = rank or 0
        if not isinstance(events, list) or not 0 <= rank < _RANKS:
            raise ValueError("not a batch")
        return int.from_bytes(frames[-2], "big"), int(rank), events

    def _store(self, rank: Holdings, event: Mapping[str, Any], run: Run) -> None:
        get = event.get
        group = get("group_idx")
        if group != rank.group and not self._follow(rank, group, event, run):
            return
        medium = get("medium")
        tier = _GPU if medium == "GPU" else tier_of(medium, get("locality"))
        keys, tokens = event["block_hashes"], event["token_ids"]
        if tokens:
            size = event["block_size"]
            if size < 1 or len(tokens) != size * len(keys):
                raise ValueError("tokens do not fill the blocks")
            start = self._start(rank, event)
            if start is None:
                self.counts["unnamed blocks"] += len(keys)
                return
            name, length, media = start
            end = length + len(tokens)
            if end > _PREFIX_TOKENS:
                raise ValueError("prefix too long")
            hashes = self._hasher.hashes(tokens, size, length, name)
            if media:
                places = [(length + n * size + at, key) for n, at, key in media]
                hashes = self._hasher.mark(hashes, size, places, length)
            rank.block_tokens = size
            if len(keys) == 1 and not self._holders:
                # What a decoding engine tells, step by step.
                rank.add_one(tier, keys[0], (hashes.item(0), end))
                run.add(BlocksStored, tier, size, hashes)
                return
            ends = range(length + size, end + 1, size)
            table = dict(zip(keys, zip(hashes.tolist(), ends)))  # noqa: B905
        else:
            # Offloading connectors may name blocks by hash alone.
            table = rank.known(keys)
            self.counts["unnamed blocks"] += len(keys) - len(table)
            hashes = named(name for name, _ in table.values())
        if self._holders:
            new = [table[key][0] for key in table.keys() - rank.held[tier].keys()]
            self._holders[tier].update(new)
        rank.add(tier, table)
        run.add(BlocksStored, tier, rank.block_tokens, hashes)

    def _start(
        self, rank: Holdings, event: Mapping[str, Any]
    ) -> tuple[int, int, list[tuple[int, int, str]]] | None:
        """Return (name, tokens) of what the event's blocks follow, if known.

        And the media that begin in them.  None as well for blocks of prompt
        embeddings and adapters without a name: tokens alone do not say what
        those hold.
        """
        get = event.get
        lora, parent = get("lora_name"), get("parent_block_hash")
        keys = get("extra_keys")
        if lora is None and get("lora_id") is not None:
            return None
        extras = extras_of(keys, lora, parent is None) if keys and any(keys) else _PLAIN
        if extras is None:
            return None
        salt, media = extras
        if parent is not None:
            entry = rank.entry(parent)
            return entry and (*entry, media)
        if salt or lora:
            return int(seed_of(salt, lora or "", self._hasher)), 0, media
        return 0, 0, media

    def _remove(self, rank: Holdings, event: Mapping[str, Any], run: Run) -> None:
        group = event.get("group_idx")
        if group is not None and group != (rank.group or 0):
            return
        tier = tier_of(event.get("medium"), event.get("locality"))
        taken = [rank.take(tier, key) for key in event["block_hashes"]]
        gone = [entry[0] for entry in taken if entry]
        self._gone(rank, gone, tier, run)

    def _gone(self, rank: Holdings, names: list[int], tier: Tier, run: Run) -> None:
        if self._holders:
            held = self._holders[tier]
            held.subtract(names)
            names = [name for name in names if held[name] < 1]
            for name in names:
                del held[name]
        run.add(BlocksRemoved, tier, rank.block_tokens, named(names))

    def _clear(
        self, rank: Holdings, at: float, reason: str, *, unknown: bool = False
    ) -> list[Report]:
        """Forget what *rank* holds; the report has no rank, so tell the others'."""
        rank.drop()
        cleared = BlocksCleared(at, self.worker, reason, unknown)
        run = Run(self.worker, at, rank.window)
        run.reports.append(cleared)
        if self._holders:
            self._count_holders()
            for other in self._ranks.values():
                for tier in Tier:
                    hashes = named(name for name, _ in other.held[tier].values())
                    run.add(BlocksStored, tier, other.block_tokens, hashes)
            run.flush()
        return run.reports

    def _count_holders(self) -> None:
        """Count ranks for each name: a name leaves with its last rank."""
        self._holders = tuple(Counter[int]() for _ in Tier)
        for rank in self._ranks.values():
            for count, table in zip(self._holders, rank.held, strict=True):
                count.update(name for name, _ in table.values())

    def _trim(self, rank: Holdings, run: Run) -> None:
        """Drop the oldest eighth: rarely, as a dict's front is slow to find."""
        kept = self._blocks_kept - self._blocks_kept // 8
        for tier in Tier:
            table = rank.held[tier]
            oldest = [*itertools.islice(table, max(0, len(table) - kept))]
            self.counts["blocks beyond the bound"] += len(oldest)
            for key in oldest:
                rank.copies.pop((tier, key), None)
            self._gone(rank, [table.pop(key)[0] for key in oldest], tier, run)
        rank.most = max(map(len, rank.held))

    def _follow(
        self, rank: Holdings, group: int | None, event: Mapping[str, Any], run: Run
    ) -> bool:
        """Say whether this cache group is the one that is indexed.

        One that holds whole prefixes, if there is any; until it shows up, one of
        sliding windows, which is all that some models have.
        """
        kind = event.get("kv_cache_spec_kind")
        window = event.get("kv_cache_spec_sliding_window") or 0
        if group is None:
            return True
        whole = kind in _WHOLE if kind else group == 0
        if whole and (rank.group is None or rank.window):
            if rank.window:
                run.flush()
                rank.window = run.window = 0
                run.reports += self._clear(
                    rank, run.at, "whole prefixes are followed now", unknown=True
                )
            rank.group = group
            return True
        if rank.group is None and kind in _SLIDING and window > 0:
            rank.group = group
            rank.window = run.window = window
            return True
        self.counts["events of other groups"] += 1
        return False

    def _rank(self, index: int) -> Holdings:
        rank = self._ranks.get(index)
        if rank is None:
            rank = self._ranks[index] = Holdings()
            if len(self._ranks) > 1:
                self._count_holders()
        return rank
