"""What an engine's metrics know: the state at the end of its last step."""

from __future__ import annotations

import math
from bisect import bisect_left

import attrs

from ..types import Signals
from .steps import Run


@attrs.define(eq=False)
class Gauges:
    """Metrics of one engine, which it sets at the end of each step.

    So who came during the step under way is not in them yet, and an idle engine
    that is given a long prompt seems idle until that is computed.

    Attributes:
        steps_ahead: As in `EngineSettings`.
        said: What they said when the last run ended.

    >>> gauges = Gauges(steps_ahead=1)
    >>> gauges.came(0.5)
    >>> gauges.unseen(Run(start=0.0, steps=4, first_s=1.0), 1)
    1
    """

    steps_ahead: int
    said: Signals = attrs.field(
        default=Signals(waiting_requests=0.0, running_requests=0.0, kv_usage=0.0),
        init=False,
    )
    # When those came whom they may not know yet; when the last step of the run
    # before began.
    _came: list[float] = attrs.field(factory=list, init=False)
    _last_step_at: float = attrs.field(default=-math.inf, init=False)

    def came(self, now: float) -> None:
        """Note that a request came while a run was under way."""
        self._came.append(now)

    def unseen(self, run: Run, steps: int) -> int:
        """Count who came and is not known by the end of the first *steps* of *run*.

        Who came during a step is taken in when it has ended; and where the next is
        scheduled ahead, the one after it before the metrics of that are set.
        """
        return len(self._came) - bisect_left(self._came, self._since(run, steps))

    def ended(self, run: Run, said: Signals) -> None:
        """Take in what they say now that *run* has ended."""
        del self._came[: bisect_left(self._came, self._since(run, run.steps))]
        self._last_step_at = run.after(run.steps - 1)
        self.said = said

    def _since(self, run: Run, steps: int) -> float:
        before = steps - 1 - self.steps_ahead
        return run.after(before) if before >= 0 else self._last_step_at
