"""What an index remembers of events, to say why an overlap is what it is."""

from __future__ import annotations

from collections import deque

import attrs

from ..types import Request, Worker, WorkerId

_SEEDS_KEPT = 256
_REMOVED_KEPT = 1 << 16


@attrs.define(eq=False)
class Told:
    """What one worker told of itself.

    Attributes:
        facts: As it joined, if it did.
        last: Time of its last event; minus infinity if there was none.
        block_tokens: By its events; 0 before the first.
        dropped: When and why its blocks were dropped, last.
    """

    facts: Worker | None = None
    last: float = -float("inf")
    block_tokens: int = 0
    dropped: tuple[float, str] | None = None


@attrs.define(eq=False)
class Heard:
    """The recent past of every worker, in bounded memory."""

    told: dict[WorkerId, Told] = attrs.field(factory=dict)
    seeds: dict[tuple[str, str], None] = attrs.field(factory=dict)
    _removed: deque[tuple[float, WorkerId, frozenset[int]]] = attrs.field(factory=deque)
    _removed_names: int = 0

    def of(self, worker: WorkerId) -> Told:
        """Return what *worker* told."""
        told = self.told.get(worker)
        if told is None:
            told = self.told[worker] = Told()
        return told

    def asked(self, request: Request) -> None:
        """Remember under which salt and adapter prompts are sent."""
        seed = request.salt, request.lora
        if seed not in self.seeds:
            if len(self.seeds) >= _SEEDS_KEPT:
                self.seeds.pop(next(iter(self.seeds)))
            self.seeds[seed] = None

    def removed(self, worker: WorkerId, names: list[int], at: float) -> None:
        """Remember that *worker* dropped *names*."""
        self._removed.append((at, worker, frozenset(names)))
        self._removed_names += len(names)
        while self._removed_names > _REMOVED_KEPT:
            self._removed_names -= len(self._removed.popleft()[2])

    def removed_at(self, worker: WorkerId, name: int) -> float | None:
        """Return when *worker* last dropped *name*, if that is remembered."""
        for at, who, names in reversed(self._removed):
            if who == worker and name in names:
                return at
        return None

    def left(self, worker: WorkerId) -> None:
        """Forget a worker that is gone."""
        self.told.pop(worker, None)


def ago(at: float, then: float) -> str:
    """Say how long ago *then* was.

    >>> ago(10.0, 7.5)
    '2.5 s ago'
    """
    return f"{at - then:.3g} s ago"


def of_the_worker(told: Told, request: Request, at: float) -> list[str]:
    """Return findings that hold whatever the prompt's tokens are."""
    findings = []
    facts = told.facts
    if facts is not None and request.lora and request.lora not in facts.loras:
        findings.append(f"it does not serve the adapter {request.lora!r}")
    block_tokens = told.block_tokens or (facts.block_tokens if facts else 0)
    if facts is not None and told.block_tokens not in (0, facts.block_tokens):
        findings.append(
            f"block size differs: it joined with {facts.block_tokens} tokens a"
            f" block, its events have {told.block_tokens}"
        )
    if request.prompt_tokens < block_tokens:
        findings.append(
            f"the prompt has {request.prompt_tokens} tokens, under one block of"
            f" {block_tokens}"
        )
    if told.dropped is not None:
        when, reason = told.dropped
        if told.last <= when:
            findings.append(
                f"its blocks were dropped {ago(at, when)}"
                f" ({reason or 'it cleared its cache'}) and it told of none since"
            )
        elif reason:
            findings.append(f"its blocks were dropped {ago(at, when)} ({reason})")
    if told.last == -float("inf"):
        findings.append("no KV event of it was ever heard")
    elif at > told.last:
        findings.append(f"no KV events for {at - told.last:.3g} s")
    return findings
