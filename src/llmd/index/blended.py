"""An index that follows events or guesses, whichever has been right."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

from ..hashing import Hashes
from ..types import Request, RequestId, Tier, Worker, WorkerId
from ..view import Ints, Mask
from .exact import ExactIndex
from .guessed import GuessedIndex
from .interface import PrefixIndex
from .tally import Record

_OPEN_KEPT = 1 << 16


@attrs.frozen
class _Asked:
    """What each belief said of a request when it was sent to a worker."""

    at: float
    exact_tokens: int
    guessed_tokens: int


@attrs.define(eq=False)
class BlendedIndex(PrefixIndex):
    """Asks an exact and a guessed index and follows, for each worker, the better.

    Better is who has agreed more with the engine's own count of cached tokens:
    the harmonic mean of precision and recall, recent requests counting most.
    While nothing is measured, events are believed of a worker that sends any.
    A worker that computed a prompt and told of no block within *grace* seconds
    has stopped telling: its guess is followed until its next event, whatever
    was measured before.

    Attributes:
        exact: What events say.
        guessed: What requests sent suggest.
        memory: Weight of the past against one more measured request, below 1.
        grace: How long an event may be on its way.
        records: How right each belief has been of each worker.

    >>> index = BlendedIndex()
    >>> index.join(Worker(id="a", block_tokens=2), at=0.0)
    >>> index.guessed.grain_tokens = 2
    >>> index.follows("a")
    'guessed'
    """

    exact: ExactIndex = attrs.field(factory=ExactIndex)
    guessed: GuessedIndex = attrs.field(factory=GuessedIndex)
    memory: float = 0.95
    grace: float = 1.0

    records: dict[WorkerId, Record] = attrs.field(factory=dict, init=False)
    # Whose events are followed, kept up to date; who owes an event; the mask.
    _trusted: dict[WorkerId, bool] = attrs.field(factory=dict, init=False)
    _owing: dict[WorkerId, None] = attrs.field(factory=dict, init=False)
    _mask: Mask | None = attrs.field(default=None, init=False)
    _masked: Sequence[WorkerId] = attrs.field(default=(), init=False)
    _open: dict[tuple[WorkerId, RequestId], _Asked] = attrs.field(
        factory=dict, init=False
    )
    _matched: tuple[Request | None, Sequence[WorkerId], Ints | None, Ints | None] = (
        attrs.field(default=(None, (), None, None), init=False)
    )

    def join(self, worker: Worker, at: float) -> None:
        self.exact.join(worker, at)
        self.guessed.join(worker, at)
        self.records.setdefault(worker.id, Record())
        self._look(worker.id, at)

    def match(self, request: Request, workers: Sequence[WorkerId], at: float) -> Ints:
        exact = self.exact.match(request, workers, at)
        guessed = self.guessed.match(request, workers, at)
        self._matched = request, workers, exact, guessed
        follow = self._following(workers, at)
        if follow.all():
            return exact
        if not follow.any():
            return guessed
        return np.where(follow[:, None], exact, guessed)

    def store(
        self, worker: WorkerId, hashes: Hashes, block_tokens: int, tier: Tier, at: float
    ) -> None:
        self.exact.store(worker, hashes, block_tokens, tier, at)
        self._hear(worker, at)

    def window(self, worker: WorkerId, tokens: int, at: float) -> None:
        self.exact.window(worker, tokens, at)

    def remove(self, worker: WorkerId, hashes: Hashes, tier: Tier, at: float) -> None:
        self.exact.remove(worker, hashes, tier, at)
        self._hear(worker, at)

    def forget(self, worker: WorkerId, reason: str, at: float) -> None:
        self.exact.forget(worker, reason, at)
        self.guessed.forget(worker, reason, at)

    def doubt(self, worker: WorkerId, reason: str, at: float) -> None:
        self.exact.doubt(worker, reason, at)
        self._record(worker).missed()
        self._look(worker, at)

    def leave(self, worker: WorkerId, at: float) -> None:
        self.exact.leave(worker, at)
        self.guessed.leave(worker, at)
        self.records.pop(worker, None)
        self._look(worker, at)
        self._open = {key: v for key, v in self._open.items() if key[0] != worker}

    def expect(self, worker: WorkerId, request: Request, at: float) -> None:
        asked = self._said(worker, request, at)
        while len(self._open) >= _OPEN_KEPT:
            del self._open[next(iter(self._open))]
        self._open[worker, request.id] = asked
        self.exact.expect(worker, request, at)
        self.guessed.expect(worker, request, at)

    def settle(
        self, worker: WorkerId, request: Request, cached_tokens: int | None, at: float
    ) -> None:
        self.exact.settle(worker, request, cached_tokens, at)
        self.guessed.settle(worker, request, cached_tokens, at)
        asked = self._open.pop((worker, request.id), None)
        record = self.records.get(worker)
        if asked is None or record is None or cached_tokens is None:
            return
        record.exact.note(asked.exact_tokens, cached_tokens, self.memory)
        record.guessed.note(asked.guessed_tokens, cached_tokens, self.memory)
        block_tokens = self.exact.block_tokens(worker)
        if request.prompt_tokens - cached_tokens > block_tokens:
            record.computed(sent_at=asked.at, at=at)
        self._look(worker, at)

    def revoke(self, worker: WorkerId, request: Request, at: float) -> None:
        self.exact.revoke(worker, request, at)
        self.guessed.revoke(worker, request, at)
        self._open.pop((worker, request.id), None)

    def follows(self, worker: WorkerId, at: float = np.inf) -> str:
        """Say which belief is followed of *worker*: `exact` or `guessed`."""
        record = self.records.get(worker)
        trusted = record is not None and record.trusts_events(at, self.grace)
        return "exact" if trusted else "guessed"

    def quality(self, worker: WorkerId) -> dict[str, tuple[float, float]]:
        """Return (precision, recall) of each belief, NaN while unmeasured."""
        record = self._record(worker)
        return {
            "exact": (record.exact.precision, record.exact.recall),
            "guessed": (record.guessed.precision, record.guessed.recall),
        }

    def recall(self, worker: WorkerId, record: Record) -> None:
        """Take over what was measured of *worker* before."""
        self.records[worker] = record
        self._look(worker, -np.inf)

    def diagnose(self, request: Request, worker: WorkerId, at: float) -> list[str]:
        record = self.records.get(worker)
        if record is None:
            return self.exact.diagnose(request, worker, at)
        belief = self.follows(worker, at)
        why = record.why(at, self.grace)
        findings = [f"the {belief} belief is followed: {why}"]
        findings += [
            f"by events, {f}" for f in self.exact.diagnose(request, worker, at)
        ]
        findings += [
            f"by guess, {f}" for f in self.guessed.diagnose(request, worker, at)
        ]
        return findings

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken; for tests."""
        self.exact.check()
        self.guessed.check()

    def _following(self, workers: Sequence[WorkerId], at: float) -> Mask:
        """Say whose events are followed, (W,)."""
        for worker in [*self._owing]:
            self._look(worker, at)
        if self._mask is None or self._masked is not workers:
            trusted = [self._trusted.get(worker, False) for worker in workers]
            self._mask, self._masked = np.array(trusted, dtype=np.bool_), workers
        return self._mask

    def _look(self, worker: WorkerId, at: float) -> None:
        """Judge *worker* anew; what was judged before stands until then."""
        record = self.records.get(worker)
        trusted = record is not None and record.trusts_events(at, self.grace)
        if trusted != self._trusted.get(worker):
            self._trusted[worker] = trusted
            self._mask = None
        if record is None:
            self._trusted.pop(worker, None)
        if record is not None and record.owes:
            self._owing[worker] = None
        else:
            self._owing.pop(worker, None)

    def _hear(self, worker: WorkerId, at: float) -> None:
        record = self._record(worker)
        news = record.owes or record.silent
        record.heard(at)
        if news:
            self._look(worker, at)

    def _said(self, worker: WorkerId, request: Request, at: float) -> _Asked:
        """Return what each belief says, from the last match where possible."""
        asked, workers, exact, guessed = self._matched
        if asked is not request or exact is None or guessed is None:
            workers = (worker,)
            exact = self.exact.match(request, workers, at)
            guessed = self.guessed.match(request, workers, at)
        row = workers.index(worker)
        return _Asked(at, int(exact[row, -1]), int(guessed[row, -1]))

    def _record(self, worker: WorkerId) -> Record:
        record = self.records.get(worker)
        if record is None:
            record = self.records[worker] = Record()
        return record
