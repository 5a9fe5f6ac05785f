"""Prefixes on their way: sent to a worker, and not yet told of by its events."""

from __future__ import annotations

from collections import Counter, deque

import attrs
import numpy as np

from ..hashing import Hashes
from ..types import Request, WorkerId
from ..view import Ints
from .holders import Holders, check
from .seats import Rows

STEP_TOKENS = 256


@attrs.define(eq=False)
class _Hope:
    """Prefixes that one request will leave on the worker *bit*, 0 if it is gone."""

    bit: int
    names: Hashes
    until: float = float("inf")


@attrs.define(eq=False)
class Hopes:
    """What requests in flight will leave behind.

    Every block of a prompt's first 256 tokens counts, then every 256 tokens:
    coarse, so that an arrival pays for 47 names of an 8k prompt and not 512.
    Bounded by the requests in flight and those that settled a moment ago.
    """

    holders: Holders = attrs.field(factory=Holders)
    # Worker's bit -> name -> hopes for it beyond the first.
    _more: dict[int, Counter[int]] = attrs.field(factory=dict, init=False)
    _open: dict[tuple[WorkerId, str], _Hope] = attrs.field(factory=dict, init=False)
    _ending: deque[_Hope] = attrs.field(factory=deque, init=False)
    # An arrival is matched and then sent: the same grid, a moment later.
    _grid: tuple[Hashes | None, int, Hashes] = attrs.field(
        default=(None, 0, np.empty(0, np.uint64)), init=False
    )

    def reach(
        self, hashes: Hashes, tokens: int, bits: int, rows: Rows, held: Ints
    ) -> None:
        """Raise in *held* what the workers *bits* hold to what they will.

        Args:
            hashes: Of a prompt, by blocks of *tokens* tokens.
            tokens: A block.
            bits: The workers to look at.
            rows: Where they stand in *held*.
            held: Tokens, shape (W, tiers).
        """
        fine = max(STEP_TOKENS // tokens, 1)
        names = self._of(hashes, tokens)
        self.holders.reach(names, bits, rows, held, tokens, fine=fine)

    def add(self, worker: WorkerId, bit: int, request: Request, tokens: int) -> None:
        """Hope that *worker* will hold *request*, in blocks of *tokens* tokens."""
        names = self._of(request.hashes(tokens), tokens)
        if not len(names):
            return
        old = self._open.pop((worker, request.id), None)
        if old is not None:  # sent there again before anything was heard
            self.holders.discard(old.bit, self._last(old))
        new = self.holders.add(bit, names)
        if len(new) < names.nbytes:
            fresh = {*np.frombuffer(new, np.uint64).tolist()}
            again = [name for name in names.tolist() if name not in fresh]
            self._more.setdefault(bit, Counter()).update(again)
        self._open[worker, request.id] = _Hope(bit, names)

    def settle(self, worker: WorkerId, request: Request, until: float) -> None:
        """Let the hope for *request* end at *until*, which never runs backwards."""
        hope = self._open.pop((worker, request.id), None)
        if hope is not None:
            hope.until = until
            self._ending.append(hope)

    def revoke(self, worker: WorkerId, request: Request) -> None:
        """End the hope for *request*: it was given up."""
        hope = self._open.pop((worker, request.id), None)
        if hope is not None and hope.bit:
            self.holders.discard(hope.bit, self._last(hope))

    def expire(self, at: float) -> None:
        """End what was to end by *at*."""
        while self._ending and self._ending[0].until <= at:
            hope = self._ending.popleft()
            if hope.bit:
                self.holders.discard(hope.bit, self._last(hope))

    def clear(self, bit: int) -> None:
        """End all hopes for the worker *bit*."""
        for hope in (*self._open.values(), *self._ending):
            if hope.bit == bit:
                self.holders.discard(bit, hope.names)
                hope.bit = 0
        self._open = {key: hope for key, hope in self._open.items() if hope.bit}
        self._more.pop(bit, None)

    def _last(self, hope: _Hope) -> Hashes | list[int]:
        """Return the names that nothing but *hope* hopes for, and count it off."""
        counts = self._more.get(hope.bit)
        if not counts:
            return hope.names
        last = []
        for name in hope.names.tolist():
            more = counts.pop(name, 0)
            if not more:
                last.append(name)
            elif more > 1:
                counts[name] = more - 1
        return last

    def _of(self, hashes: Hashes, tokens: int) -> Hashes:
        of, size, names = self._grid
        if of is not hashes or size != tokens:
            names = grid(hashes, tokens)
            self._grid = hashes, tokens, names
        return names

    def check(self, known: int) -> None:
        """Raise AssertionError if an invariant is broken; for tests."""
        check(self.holders, known)
        hoped = Counter(
            (hope.bit, name)
            for hope in (*self._open.values(), *self._ending)
            for name in hope.names.tolist()
            if hope.bit
        )
        for (bit, name), hopes in hoped.items():
            assert bit & known, "a stranger is hoped for"
            assert self.holders.find(name, 0) & bit, "a hope does not count"
            more = self._more.get(bit, Counter())[name]
            assert more == hopes - 1, "miscounted"
        held = sum(mask.bit_count() for _, mask in self.holders.items())
        assert held == len(hoped), "what nobody hopes for is held"


def grid(hashes: Hashes, block_tokens: int) -> Hashes:
    """Return the prefixes that are hoped for, each a prefix of the next.

    >>> hashes = Request(id="r", prompt=range(600)).hashes(16)
    >>> names = grid(hashes, 16)  # of 16, 32 ... 256 tokens, and of 512
    >>> len(names), bool(names[-1] == hashes[31])
    (17, True)
    """
    fine = max(STEP_TOKENS // block_tokens, 1)
    if len(hashes) < 2 * fine:
        return hashes[:fine]
    return np.concatenate((hashes[:fine], hashes[2 * fine - 1 :: fine]))
