"""Between what an engine tells and who listens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ...events import BlocksCleared, SignalsReported
from ...live.engine import Report
from ...types import Signals, WorkerId


class Gate:
    """Keeps reports to itself until it is opened.

    What an engine tells while it warms up is about requests nobody made.

    Attributes:
        opened: Let reports through from now on.
        cleared: Set when the engine told that it dropped its cache.
    """

    def __init__(self, report: Callable[[Report], None]) -> None:
        self.opened = False
        self.cleared = asyncio.Event()
        self._report = report

    def __call__(self, report: Report) -> None:
        if self.opened:
            self._report(report)
        elif isinstance(report, BlocksCleared):
            self.cleared.set()


class Throttle:
    """Reports the newest signals, at most once in *every* seconds.

    The last ones before a silence are reported too, when their time comes.
    """

    def __init__(
        self, worker: WorkerId, report: Callable[[Report], None], every: float
    ) -> None:
        self._worker = worker
        self._report = report
        self._every = every
        self._loop = asyncio.get_running_loop()
        self._next = 0.0
        self._latest: tuple[Signals, float] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self, signals: Signals) -> None:
        now = self._loop.time()
        self._latest = signals, now
        if self._timer is None:
            self._timer = self._loop.call_at(max(now, self._next), self._tell)

    def close(self) -> None:
        """Report nothing more."""
        if self._timer is not None:
            self._timer.cancel()

    def _tell(self) -> None:
        self._timer = None
        now = self._loop.time()
        self._next = now + self._every
        if self._latest is not None:
            signals, measured_at = self._latest
            self._report(SignalsReported(now, self._worker, signals, measured_at))
