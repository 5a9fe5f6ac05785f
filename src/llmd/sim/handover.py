"""KV between a worker that computed a prompt and the one that answers it."""

from __future__ import annotations

import attrs

from ..types import RequestId, WorkerId
from .links import Links


@attrs.frozen
class Pair:
    """Who computes a prompt, and who is promised its KV."""

    source: WorkerId
    target: WorkerId


@attrs.define(eq=False)
class Handovers:
    """Prompts that another worker answers, from their dispatch to their arrival.

    Attributes:
        links: Over which they go.

    >>> handovers = Handovers(Links(bytes_per_s=10.0))
    >>> handovers.promise("r", Pair("p", "d"))
    >>> handovers.of_target("d")
    [('r', Pair(source='p', target='d'))]
    >>> handovers.begin("r", 20.0, now=0.0)
    >>> handovers.next_end(), handovers.arrived(2.0)
    (2.0, [('r', Pair(source='p', target='d'))])
    """

    links: Links
    _pairs: dict[RequestId, Pair] = attrs.field(factory=dict, init=False)

    def promise(self, id: RequestId, pair: Pair) -> None:
        """Note who will be given the KV of *id*."""
        self._pairs[id] = pair

    def of(self, id: RequestId) -> Pair | None:
        """Return who hands *id* over and to whom, if anybody does."""
        return self._pairs.get(id)

    def begin(self, id: RequestId, size_bytes: float, now: float) -> None:
        """Let the KV of *id* go."""
        pair = self._pairs[id]
        self.links.start(id, pair.source, pair.target, size_bytes, now)

    def drop(self, id: RequestId, now: float) -> Pair | None:
        """Give *id* up; return who was to hand it over, if anybody was."""
        self.links.cancel(id, now)
        return self._pairs.pop(id, None)

    def next_end(self) -> float:
        """Return when the next arrives if no other begins; inf if none."""
        return self.links.next_end()

    def arrived(self, now: float) -> list[tuple[RequestId, Pair]]:
        """Take away and return those that have arrived by *now*."""
        return [(id, self._pairs.pop(id)) for id in self.links.ended(now)]

    def of_source(self, source: WorkerId) -> list[tuple[RequestId, Pair]]:
        """Return what a worker is to hand over."""
        return [(id, p) for id, p in self._pairs.items() if p.source == source]

    def of_target(self, target: WorkerId) -> list[tuple[RequestId, Pair]]:
        """Return what is promised to a worker."""
        return [(id, p) for id, p in self._pairs.items() if p.target == target]
