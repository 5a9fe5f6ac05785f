"""The `PrefixIndex` interface."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from ..copied import Copied
from ..hashing import Hashes
from ..types import Request, Tier, Worker, WorkerId
from ..view import Ints


class PrefixIndex(Copied, abc.ABC):
    """Maps prefixes to the workers that hold their KV blocks.

    Subclasses implement `match` and whichever of the others tell them what
    they need: engines' own events (`store`, `remove`), or the requests that
    were sent (`expect`, `settle`).  Times, `at`, never run backwards.
    """

    @abc.abstractmethod
    def match(self, request: Request, workers: Sequence[WorkerId], at: float) -> Ints:
        """Count the leading prompt tokens each of *workers* holds.

        Returns:
            Shape (W, tiers); column t counts what is in tier t or a faster
            one, so rows never decrease.
        """

    def join(self, worker: Worker, at: float) -> None:
        """Meet a worker, before anything else is said of it."""

    def forget(self, worker: WorkerId, reason: str, at: float) -> None:
        """Drop all of *worker*: its cache is empty; it may go on to store more."""

    def doubt(self, worker: WorkerId, reason: str, at: float) -> None:
        """Note that what *worker* holds became unknown, though not nothing.

        The default forgets it, as nothing told can be relied on.
        """
        self.forget(worker, reason, at)

    def window(self, worker: WorkerId, tokens: int, at: float) -> None:
        """Note that *worker* attends to the last *tokens* only.

        It may then hold a usable prefix without holding all shorter ones.
        """

    def leave(self, worker: WorkerId, at: float) -> None:
        """Drop *worker* itself; it never comes back."""
        self.forget(worker, "left", at)

    def store(
        self, worker: WorkerId, hashes: Hashes, block_tokens: int, tier: Tier, at: float
    ) -> None:
        """Note that *worker* now holds *hashes*, (n,); repeats do no harm."""

    def remove(self, worker: WorkerId, hashes: Hashes, tier: Tier, at: float) -> None:
        """Note that *worker* dropped *hashes*, (n,); unknown ones are ignored."""

    def expect(self, worker: WorkerId, request: Request, at: float) -> None:
        """Note that *request* was sent to *worker*, which will store it."""

    def settle(
        self, worker: WorkerId, request: Request, cached_tokens: int | None, at: float
    ) -> None:
        """Note that *worker* computed the prompt of *request*.

        It found *cached_tokens* in its cache by its own count; None if it did
        not say.
        """

    def revoke(self, worker: WorkerId, request: Request, at: float) -> None:
        """Note that *worker* gave *request* up before it answered.

        What it had computed by then it may hold, and its events say so.  The
        default settles it.
        """
        self.settle(worker, request, None, at)

    def diagnose(self, request: Request, worker: WorkerId, at: float) -> list[str]:
        """Say in words why *worker* may hold nothing of *request*."""
        return []
