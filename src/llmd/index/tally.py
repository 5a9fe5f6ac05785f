"""How right a belief about a worker's cache has been."""

from __future__ import annotations

import attrs

_NAN = float("nan")


@attrs.define
class Tally:
    """Tokens said to be cached, tokens that were, and both.

    >>> tally = Tally()
    >>> tally.note(said_tokens=100, were_tokens=50, memory=0.9)
    >>> tally.precision, tally.recall
    (0.5, 1.0)
    """

    said: float = 0.0
    were: float = 0.0
    both: float = 0.0

    def note(self, said_tokens: int, were_tokens: int, memory: float) -> None:
        """Count one more request, the past *memory* times as much as before."""
        self.said = memory * self.said + said_tokens
        self.were = memory * self.were + were_tokens
        self.both = memory * self.both + min(said_tokens, were_tokens)

    @property
    def precision(self) -> float:
        """Part of what was said that was so; NaN if nothing was said."""
        return self.both / self.said if self.said else _NAN

    @property
    def recall(self) -> float:
        """Part of what was so that was said; NaN if nothing was so."""
        return self.both / self.were if self.were else _NAN

    @property
    def agreement(self) -> float:
        """Harmonic mean of both in [0, 1]; NaN while nothing was measured."""
        total = self.said + self.were
        return 2.0 * self.both / total if total else _NAN


@attrs.define
class Record:
    """What is known of how a worker tells of its cache.

    Attributes:
        exact: How right its events were.
        guessed: How right the guess was.
        last_event: When it last told anything.
        doubted: Events were missed; until measured, the guess is better.
        owed_since: When the first prompt was computed of which no event told.
    """

    exact: Tally = attrs.field(factory=Tally)
    guessed: Tally = attrs.field(factory=Tally)
    last_event: float = -float("inf")
    doubted: bool = False
    owed_since: float = float("inf")

    @property
    def silent(self) -> bool:
        """It never told anything."""
        return self.last_event == -float("inf")

    @property
    def owes(self) -> bool:
        """It computed a prompt and told of none of it yet."""
        return self.owed_since < float("inf")

    def heard(self, at: float) -> None:
        """Note an event."""
        self.last_event = at
        self.owed_since = float("inf")

    def missed(self) -> None:
        """Note that events were lost: what was measured before is void."""
        self.exact = Tally()
        self.doubted = True

    def computed(self, sent_at: float, at: float) -> None:
        """Note that a prompt sent at *sent_at* was computed by *at*."""
        if self.last_event < sent_at:
            self.owed_since = min(self.owed_since, at)

    def trusts_events(self, at: float, grace: float) -> bool:
        """Say whether its events are the better guide at *at*."""
        if self.silent:
            return False
        if self.owed_since + grace < at < float("inf"):
            return False
        events, guess = self.exact.agreement, self.guessed.agreement
        if events != events:
            return not self.doubted
        return not guess > events

    def why(self, at: float, grace: float) -> str:
        """Say why `trusts_events` says what it does."""
        if self.silent:
            return "no KV event of it was ever heard"
        if self.owed_since + grace < at < float("inf"):
            return (
                f"it computed a prompt {at - self.owed_since:.3g} s ago and told of"
                " no block since"
            )
        events, guess = self.exact.agreement, self.guessed.agreement
        if events != events:
            return "events were missed" if self.doubted else "nothing is measured yet"
        return f"events agreed {events:.2f} with its own counts, the guess {guess:.2f}"
