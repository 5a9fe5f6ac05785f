"""Load that other routers of the same fleet have booked.

Each router tells the others, every so often, the whole of what it has booked
itself.  The last word of a peer replaces all it said before, and is void when
the peer has not been heard for a while: messages may be lost, doubled or late,
and a peer that died leaves nothing behind.  What peers booked is added to the
columns that policies read, so that every policy sees the load that is there.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from .events import PeerReported
from .fleet import Fleet
from .types import Load, WorkerId

_PEERS_KEPT = 256
_COLUMNS = ("running_requests", "waiting_requests", "prefill_tokens", "context_tokens")


@attrs.define(eq=False)
class _Peer:
    sequence: int
    until: float
    loads: Mapping[WorkerId, Load]


@attrs.define(eq=False)
class Peers:
    """The last word of each peer, added to *fleet*.

    Last writer wins, by the peer's own sequence numbers: those of one peer
    never go back, as one that restarts has a new name.
    """

    fleet: Fleet
    _peers: dict[str, _Peer] = attrs.field(factory=dict, init=False)

    def __len__(self) -> int:
        return len(self._peers)

    def hear(self, event: PeerReported) -> None:
        """Put a peer's word in place of its last one; late ones are ignored."""
        known = self._peers.get(event.peer)
        if known is not None and event.sequence <= known.sequence:
            return
        if known is None and len(self._peers) >= _PEERS_KEPT:
            return
        self._drop(event.peer)
        until = event.at + event.valid_s
        self._peers[event.peer] = _Peer(event.sequence, until, event.loads)
        for worker, load in event.loads.items():
            self._add(worker, load, 1)

    def expire(self, at: float) -> None:
        """Forget the peers that were not heard in time."""
        if self._peers:
            for name in [n for n, peer in self._peers.items() if peer.until <= at]:
                self._drop(name)

    def joined(self, worker: WorkerId) -> None:
        """Add what peers have booked on a worker that is new here."""
        for peer in self._peers.values():
            if worker in peer.loads:
                self._add(worker, peer.loads[worker], 1)

    def own(self) -> dict[WorkerId, Load]:
        """Return what this router has booked itself, idle workers left out."""
        columns, loads = self.fleet.columns, {}
        for row, worker in enumerate(self.fleet.workers.ids):
            cells = [int(columns[name][row]) for name in _COLUMNS]
            for peer in self._peers.values():
                theirs = peer.loads.get(worker)
                if theirs is not None:
                    cells = [a - b for a, b in zip(cells, theirs, strict=True)]
            if any(cells):
                loads[worker] = Load(*cells)
        return loads

    def _drop(self, name: str) -> None:
        peer = self._peers.pop(name, None)
        if peer is not None:
            for worker, load in peer.loads.items():
                self._add(worker, load, -1)

    def _add(self, worker: WorkerId, load: Load, sign: int) -> None:
        row = self.fleet.row(worker)
        if row is not None:
            for name, amount in zip(_COLUMNS, load, strict=True):
                self.fleet.add(row, name, sign * amount)
