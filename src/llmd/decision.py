"""A routing decision, and the table that explains it."""

from __future__ import annotations

import html
from collections.abc import Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from .types import WorkerId

_Floats = NDArray[np.float64]
_Signal = NDArray[np.float64] | NDArray[np.int64]


@attrs.frozen(eq=False)
class Term:
    """One part of a cost, for each of W workers.

    Attributes:
        name: What it measures.
        raw: The signal it was made from, shape (W,).
        unit: Of the signal.
        value: The signal as the router counts it, shape (W,).
        weight: What the value is multiplied by.
        age: Seconds since the signal was measured, shape (W,); zero for what
            the cluster counts itself.
    """

    name: str
    raw: _Signal
    unit: str
    value: _Floats
    weight: float = 1.0
    age: _Floats | float = 0.0


@attrs.frozen
class Decision:
    """Where a request runs: `decode` always, `prefill` if elsewhere.

    Decisions for the same workers are equal, whatever led to them.

    Attributes:
        decode: The worker that answers.
        prefill: The worker that computes the prompt for it, or None.
        candidates: Workers that were priced, shape (W,) like what follows.
        costs: What each was priced at, lower is better.
        terms: What the costs are made of.
        tied: How many shared the lowest cost; `view.rng` chose.
        notes: Findings in words: why not disaggregated, why no overlap.
        prefill_decision: How the prefill worker was chosen.
    """

    decode: WorkerId
    prefill: WorkerId | None = None
    candidates: tuple[WorkerId, ...] = attrs.field(default=(), eq=False, repr=False)
    costs: _Floats | None = attrs.field(default=None, eq=False, repr=False)
    terms: tuple[Term, ...] = attrs.field(default=(), eq=False, repr=False)
    tied: int = attrs.field(default=1, eq=False, repr=False)
    notes: tuple[str, ...] = attrs.field(default=(), eq=False)
    prefill_decision: Decision | None = attrs.field(default=None, eq=False, repr=False)

    @property
    def first(self) -> WorkerId:
        """The worker that computes the prompt."""
        return self.decode if self.prefill is None else self.prefill

    def explain(self) -> Explanation:
        """Return the table behind the decision, to print or to show.

        >>> costs = np.array([0.5, 0.25])
        >>> queue = Term("queue", np.array([9.0, 4.0]), "tokens", costs)
        >>> print(Decision("b", candidates=("a", "b"), costs=costs,
        ...                terms=(queue,)).explain())
        worker  queue                cost
        ------  -------------------  ----
        a       9 tokens -> 0.5 x1   0.5
        b *     4 tokens -> 0.25 x1  0.25
        b has the lowest cost
        """
        return Explanation(self)


@attrs.frozen(eq=False, repr=False)
class Explanation:
    """A decision as a table: a row for each worker, a column for each term."""

    decision: Decision

    @property
    def columns(self) -> tuple[str, ...]:
        """Column heads."""
        return ("worker", *(term.name for term in self.decision.terms), "cost")

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The cells, the chosen worker marked with a star."""
        decision = self.decision
        if decision.costs is None:
            return []
        return [
            (
                f"{worker} *" if worker == decision.decode else worker,
                *(_cell(term, row) for term in decision.terms),
                f"{decision.costs[row]:.4g}",
            )
            for row, worker in enumerate(decision.candidates)
        ]

    @property
    def verdict(self) -> tuple[str, ...]:
        """What was decided and how, in sentences."""
        decision = self.decision
        how = (
            f"{decision.decode} has the lowest cost"
            if decision.tied == 1
            else f"{decision.decode} drawn at random from {decision.tied} that tie"
        )
        split = (
            ()
            if decision.prefill is None
            else (f"prompt computed on {decision.prefill}",)
        )
        return (how, *split, *decision.notes)

    def __str__(self) -> str:
        lines = [*_table(self.columns, self.rows), *self.verdict]
        if self.decision.prefill_decision is not None:
            lines += ["prefill:", str(self.decision.prefill_decision.explain())]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        said = "<br>".join(html.escape(line) for line in self.verdict)
        own = f"<table><tr>{head}</tr>{body}</table><p>{said}</p>"
        other = self.decision.prefill_decision
        return own if other is None else own + other.explain()._repr_html_()


def _cell(term: Term, row: int) -> str:
    age = float(np.broadcast_to(term.age, term.value.shape)[row])
    aged = f" ({age:.3g} s old)" if age > 0 else ""
    unit = f" {term.unit}" if term.unit else ""
    return (
        f"{term.raw[row]:.4g}{unit}{aged} -> {term.value[row]:.4g} x{term.weight:.4g}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return [
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
