"""What an autoscaler recommends, and the way from its proposals to that count."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import attrs

from .errors import LlmdError, shortened


@attrs.frozen
class Proposal:
    """What one signal alone asks for.

    Attributes:
        name: Of the signal.
        workers: How many it asks for; NaN if it cannot be told.
        note: What was measured, or why nothing could be, in words.
    """

    name: str
    workers: float
    note: str = ""

    @classmethod
    def untold(cls, name: str, error: Exception) -> Proposal:
        """Return that of a signal that *error* kept from being told."""
        own = isinstance(error, LlmdError)
        said = str(error) if own else f"{type(error).__name__}: {error}"
        return cls(name, math.nan, shortened(said, 200))

    @property
    def valid(self) -> bool:
        """Whether the signal could be told."""
        return not math.isnan(self.workers)


@attrs.frozen
class Step:
    """One rule's effect on the count.

    Attributes:
        rule: Its name; for an HPA the reason that Kubernetes would report.
        before: Workers before it.
        after: Workers after it.
        reason: In words.
    """

    rule: str
    before: int
    after: int
    reason: str


@attrs.frozen(kw_only=True)
class Recommendation:
    """How many workers there should be, and why.

    Attributes:
        at: When it was made, seconds.
        current: Workers asked for before.
        workers: Workers asked for now.
        proposals: What each signal asked for.
        steps: What turned the largest proposal into `workers`, in order.
        pool: Which workers it is about; empty for all.
        parts: One for each pool, where there are several.

    >>> queue = Proposal("queue", 7.2, "36 requests, 5 a worker")
    >>> limit = Step("max_workers", 8, 4, "never more than 4")
    >>> print(Recommendation(at=9.0, current=2, workers=4, proposals=(queue,),
    ...                      steps=(limit,)).explain())
    2 -> 4 workers at 9 s
      queue wants 7.2: 36 requests, 5 a worker
      8 -> 4 by max_workers: never more than 4
    """

    at: float
    current: int
    workers: int
    proposals: tuple[Proposal, ...] = ()
    steps: tuple[Step, ...] = ()
    pool: str = ""
    parts: tuple[Recommendation, ...] = ()

    @classmethod
    def together(cls, at: float, parts: Sequence[Recommendation]) -> Recommendation:
        """Return the sum of *parts*, made *at* one moment."""
        return cls(
            at=at,
            current=sum([part.current for part in parts]),
            workers=sum([part.workers for part in parts]),
            parts=tuple(parts),
        )

    def explain(self) -> str:
        """Return every proposal, and which rule bounded or held it, in lines."""
        pool = f"{self.pool}: " if self.pool else ""
        lines = [f"{pool}{self.current} -> {self.workers} workers at {self.at:.6g} s"]
        for proposal in self.proposals:
            wish = f"wants {proposal.workers:.4g}" if proposal.valid else "cannot tell"
            note = f": {proposal.note}" if proposal.note else ""
            lines.append(f"  {proposal.name} {wish}{note}")
        for step in self.steps:
            count = (
                f"{step.before} -> {step.after} by"
                if step.before != step.after
                else f"{step.after} kept by"
            )
            lines.append(f"  {count} {step.rule}: {step.reason}")
        lines += [textwrap.indent(part.explain(), "  ") for part in self.parts]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.explain()
