"""Whether a request may enter, and the table that explains it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import attrs


@attrs.frozen
class Check:
    """What one gate looked at.

    Attributes:
        gate: Its name.
        value: What it measured.
        limit: What it allows.
        unit: Of both.
        passed: Whether it let the request in.
        note: What a reader must know, such as signals too old to be used.
        retry_after: Seconds until another try makes sense; NaN if unknown.
    """

    gate: str
    value: float
    limit: float
    unit: str
    passed: bool
    note: str = ""
    retry_after: float = math.nan

    def __str__(self) -> str:
        sign = "<=" if self.passed else ">"
        note = f" ({self.note})" if self.note else ""
        return (
            f"{self.gate}: {self.value:.4g} {sign} {self.limit:.4g} {self.unit}{note}"
        )


@attrs.frozen
class Verdict:
    """Whether a request may enter, and whether it goes at once.

    Attributes:
        admitted: False refuses it; one that may enter goes on when it is next
            and a worker has room.
        reason: Why it was refused, for the client.
        retry_after: Seconds until another try makes sense; NaN if unknown.
        checks: What led to it, in order.
        queued: It may enter and has to wait, as far as `Cluster.verdict` can see;
            a balancer does not say.

    >>> check = Check("full", 8, 7, "requests", False, retry_after=1.0)
    >>> verdict = Verdict.of([Check("rate", 1, 60, "requests", True), check])
    >>> print(verdict.explain())
    rate: 1 <= 60 requests
    full: 8 > 7 requests
    refused: full: 8 > 7 requests; retry after 1 s
    """

    admitted: bool
    reason: str = ""
    retry_after: float = math.nan
    checks: tuple[Check, ...] = attrs.field(default=(), eq=False)
    queued: bool = False

    @property
    def outcome(self) -> Literal["admit", "queue", "reject"]:
        """What becomes of the request, in one word.

        >>> ADMIT.outcome, Verdict(False).outcome, Verdict(True, queued=True).outcome
        ('admit', 'reject', 'queue')
        """
        if not self.admitted:
            return "reject"
        return "queue" if self.queued else "admit"

    @classmethod
    def of(cls, checks: Sequence[Check]) -> Verdict:
        """Admit if every check passed; else wait for the slowest to pass."""
        failed = [check for check in checks if not check.passed]
        if not failed:
            return cls(True, checks=tuple(checks)) if checks else ADMIT
        known = [c.retry_after for c in failed if not math.isnan(c.retry_after)]
        return cls(
            False,
            "; ".join(map(str, failed)),
            max(known, default=math.nan),
            tuple(checks),
        )

    def explain(self) -> str:
        """Return the checks and what came of them, a line each."""
        last = "admitted, to wait" if self.queued else "admitted"
        if not self.admitted:
            last = f"refused: {self.reason}"
            if not math.isnan(self.retry_after):
                last += f"; retry after {self.retry_after:.3g} s"
        return "\n".join([*map(str, self.checks), last])


ADMIT = Verdict(True)
