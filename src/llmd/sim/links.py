"""Links that transfers share: each gets its part of the slower end."""

from __future__ import annotations

import attrs

from ..types import RequestId, WorkerId


@attrs.define(eq=False)
class _Transfer:
    id: RequestId
    source: WorkerId
    target: WorkerId
    bytes_left: float


@attrs.define(eq=False)
class Links:
    """One link into and one out of each worker.

    A transfer runs at the smaller of its fair parts of its source's and its
    target's link (processor sharing; what one end cannot use, nobody gets).

    Attributes:
        bytes_per_s: Of links of workers that *rates* does not name.
        rates: Of both links of a worker, bytes a second.
        latency_s: Before the first byte.

    >>> links = Links(bytes_per_s=100.0)
    >>> links.start("one", "p1", "d", 100.0, now=0.0)
    >>> links.start("two", "p2", "d", 100.0, now=0.0)
    >>> links.next_end(), links.ended(2.0)
    (2.0, ['one', 'two'])
    """

    bytes_per_s: float
    latency_s: float = 0.0
    rates: dict[WorkerId, float] = attrs.field(factory=dict)
    moved_bytes: float = attrs.field(default=0.0, init=False)
    _transfers: dict[RequestId, _Transfer] = attrs.field(factory=dict, init=False)
    _now: float = attrs.field(default=0.0, init=False)

    def __len__(self) -> int:
        return len(self._transfers)

    def start(
        self,
        id: RequestId,
        source: WorkerId,
        target: WorkerId,
        size_bytes: float,
        now: float,
    ) -> None:
        """Begin to move *size_bytes*; latency counts as bytes at full rate."""
        self._advance(now)
        self.moved_bytes += size_bytes
        total = size_bytes + self.latency_s * self.bytes_per_s
        self._transfers[id] = _Transfer(id, source, target, total)

    def cancel(self, id: RequestId, now: float) -> None:
        """Give a transfer up, if it is under way."""
        self._advance(now)
        self._transfers.pop(id, None)

    def next_end(self) -> float:
        """Return when the next transfer ends if no other begins; inf if none."""
        ends = [transfer.bytes_left / rate for transfer, rate in self._rates()]
        return self._now + min(ends) if ends else float("inf")

    def ended(self, now: float) -> list[RequestId]:
        """Take away and return those that have ended by *now*."""
        self._advance(now)
        # A byte is below what a float of seconds resolves at these rates.
        done = [t.id for t in self._transfers.values() if t.bytes_left < 1.0]
        for id in done:
            del self._transfers[id]
        return done

    def _advance(self, now: float) -> None:
        passed = now - self._now
        self._now = now
        if passed > 0:
            for transfer, rate in self._rates():
                transfer.bytes_left -= rate * passed

    def _rates(self) -> list[tuple[_Transfer, float]]:
        sources: dict[WorkerId, int] = {}
        targets: dict[WorkerId, int] = {}
        for transfer in self._transfers.values():
            sources[transfer.source] = sources.get(transfer.source, 0) + 1
            targets[transfer.target] = targets.get(transfer.target, 0) + 1
        return [
            (
                transfer,
                min(
                    self._rate(transfer.source) / sources[transfer.source],
                    self._rate(transfer.target) / targets[transfer.target],
                ),
            )
            for transfer in self._transfers.values()
        ]

    def _rate(self, worker: WorkerId) -> float:
        return self.rates.get(worker, self.bytes_per_s)
