"""Fairness that keeps cached prefixes together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

import attrs
import numpy as np

from ..booking import Booking
from ..types import Request, RequestId, WorkerId
from ..view import Mask, View
from .amounts import POSITIVE, WHOLE
from .fair import Vtc
from .interface import Place


@attrs.define(eq=False)
class Relatives:
    """Waiting requests by the prefixes they share, at depths of 1, 2, 4 ... blocks.

    `add` and `drop` are O(log blocks).

    Attributes:
        look: Relatives that `of` returns, at most.
    """

    look: int = 8
    _names: dict[RequestId, tuple[int, ...]] = attrs.field(factory=dict, init=False)
    # Those that are here more than once, as when one balancer replaces another.
    _again: Counter[RequestId] = attrs.field(factory=Counter, init=False)
    _groups: dict[int, dict[RequestId, None]] = attrs.field(factory=dict, init=False)

    def __len__(self) -> int:
        return len(self._names)

    def add(self, request: Request, block_tokens: int) -> None:
        """Put a request among those that share its prefixes."""
        if request.id in self._names:
            self._again[request.id] += 1
            return
        hashes = request.hashes(block_tokens)
        depths = [(1 << power) - 1 for power in range(len(hashes).bit_length())]
        names = tuple([int(hashes[depth]) for depth in depths])
        self._names[request.id] = names
        for name in names:
            self._groups.setdefault(name, {})[request.id] = None

    def drop(self, id: RequestId) -> None:
        """Take a request out, unless it is here once more."""
        if self._again[id] > 0:
            self._again[id] -= 1
            return
        del self._again[id]
        for name in self._names.pop(id, ()):
            group = self._groups[name]
            del group[id]
            if not group:
                del self._groups[name]

    def of(self, request: Request, block_tokens: int) -> list[RequestId]:
        """Return those that share most with *request*, itself not counted."""
        found: dict[RequestId, None] = {}
        hashes = request.hashes(block_tokens)
        for power in reversed(range(len(hashes).bit_length())):
            for id in self._groups.get(int(hashes[(1 << power) - 1]), ()):
                if id != request.id:
                    found[id] = None
                if len(found) >= self.look:
                    return [*found]
        return [*found]

    def oldest(self, count: int) -> list[RequestId]:
        """Return requests in rotation, so that each has its turn."""
        ids = [id for id, _ in zip(self._names, range(count), strict=False)]
        for id in ids:
            self._names[id] = self._names.pop(id)
        return ids


@attrs.define(eq=False, kw_only=True)
class Dlpm(Vtc):
    """Deficit longest prefix match: locality first, within what fairness allows.

    Cao et al., "Locality-aware Fair Scheduling in LLM Serving", 2025.  Among
    tenants whose deficit is positive, the request with the longest cached
    prefix goes next; when none is, all who wait are refilled.  What a tenant
    has had, counted in quanta, says how often it was refilled, so a refill
    costs nothing.  The service of two tenants that wait throughout an
    interval differs by at most 2 * (quantum + prompt_weight * longest prompt
    + output_weight * tokens that all running requests hold at once).

    How much of a prompt is cached changes while it waits.  It is looked up
    on arrival, again when a request that shares a prefix is dispatched, and
    in rotation, `look` requests in all for each dispatch.

    Attributes:
        quantum: Tokens a refill, at weight 1.0; more of it favours locality.
        look: Waiting requests looked up again for each dispatch.

    >>> Dlpm(quantum=4096.0).quantum
    4096.0
    """

    quantum: float = attrs.field(default=2048.0, validator=POSITIVE)
    look: int = attrs.field(default=8, validator=WHOLE)
    _relatives: Relatives = attrs.field(init=False, repr=False)
    _moved: list[RequestId] = attrs.field(factory=list, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._relatives = Relatives(look=self.look)

    def turn(self, flow: Hashable, view: View) -> Any:
        return self.ledger[flow] // self.quantum

    def key(self, request: Request, view: View) -> Any:
        return -self._cached(request, view), self.order.key(request, view)

    def place(self, request: Request, view: View, since: float) -> Place:
        below = self.order.place(request, view, since)
        key = (-self._cached(request, view), below.key)
        return Place(key, self.flow(request), below.lane, below.until)

    def moved(self, view: View) -> Iterable[RequestId]:
        moved, self._moved = self._moved, []
        return [*self.order.moved(view), *moved]

    def prompt_cost(self, booking: Booking) -> float:
        return self.prompt_weight * booking.uncached_tokens

    def queued(self, request: Request, view: View) -> None:
        super().queued(request, view)
        self._relatives.add(request, _block_tokens(view))

    def unqueued(self, request: Request, view: View) -> None:
        super().unqueued(request, view)
        self._relatives.drop(request.id)

    def dispatched(self, booking: Booking, view: View) -> None:
        super().dispatched(booking, view)
        relatives = self._relatives.of(booking.request, _block_tokens(view))
        rest = self.look - len(relatives)
        self._moved = relatives + self._relatives.oldest(max(rest, 1))

    def _cached(self, request: Request, view: View) -> int:
        cached = view.cached_tokens(request)
        return int(cached[:, -1].max()) if len(cached) else 0


def _block_tokens(view: View) -> int:
    sizes = view.workers.block_tokens
    return int(sizes[0]) if len(sizes) else 16


@attrs.define(eq=False, kw_only=True)
class D2lpm(Dlpm):
    """DLPM over workers: a tenant has a deficit on each worker as well.

    Cao et al., 2025, as in `Dlpm`.  A tenant leaves the worker that holds its
    prefixes once it has used up its quantum there, so that locality cannot
    pile up load; its request then goes where it has had least.  Of two
    workers that both have room for a tenant throughout an interval, it gets
    at most *worker_quantum*, one request, and output_weight * what its requests
    there generate more from one than from the other: output is charged as it
    comes, and what runs stays where it is.

    Attributes:
        worker_quantum: Tokens on one worker before others come first.

    >>> D2lpm(worker_quantum=1024.0).worker_quantum
    1024.0
    """

    worker_quantum: float = attrs.field(default=16384.0, validator=POSITIVE)
    _had: dict[Hashable, dict[WorkerId, float]] = attrs.field(
        factory=dict, init=False, repr=False
    )

    def room(self, request: Request, view: View) -> Mask:
        room = self.order.room(request, view)
        if not room.any():
            return room
        had, ids = self._had_on(self.tenant(request), view), view.workers.ids
        rounds = np.array([had[id] for id in ids]) // self.worker_quantum
        allowed: Mask = room & (rounds == rounds[room].min())
        return allowed

    def dispatched(self, booking: Booking, view: View) -> None:
        super().dispatched(booking, view)
        worker = booking.decision.first
        self._add(booking, worker, self.prompt_cost(booking), view)

    def generated(self, booking: Booking, tokens: int, view: View) -> None:
        super().generated(booking, tokens, view)
        worker = booking.decision.decode
        self._add(booking, worker, self.token_cost(tokens), view)

    def _add(
        self, booking: Booking, worker: WorkerId, tokens: float, view: View
    ) -> None:
        tenant = self.tenant(booking.request)
        had = self._had_on(tenant, view.able(booking.request))
        if worker not in had:  # it has become unable to serve it meanwhile
            return
        if len(had) > 2 * len(view.workers):
            for gone in had.keys() - set(view.workers.ids):
                del had[gone]
        had[worker] += tokens / self.weight(tenant)

    def _had_on(self, tenant: Hashable, view: View) -> dict[WorkerId, float]:
        """Return what a tenant had on each worker; *view*: those it could use now.

        One that it could not use before is level with the one of them that had
        least, so that it makes up for nothing.
        """
        had = self._had.get(tenant)
        if had is None:
            # Whom the ledger has forgotten is forgotten here too.
            if len(self._had) > 2 * len(self.ledger):
                self._had = {t: h for t, h in self._had.items() if t in self.ledger}
            had = self._had[tenant] = {}
        ids = view.workers.ids
        new = [id for id in ids if id not in had]
        if new:
            least = min([had[id] for id in ids if id in had], default=0.0)
            had |= dict.fromkeys(new, least)
        return had
