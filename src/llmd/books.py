"""What runs where: bookings made on dispatch and released on every way out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import attrs

from .booking import Booking
from .fleet import Fleet
from .types import RequestId, WorkerId


@attrs.define(eq=False)
class Books:
    """Bookings by request and by worker; every cell they touch is in *fleet*.

    A booking adds to the worker's columns what ending it takes away again, so
    an idle fleet's columns are zero whatever happened before.
    """

    fleet: Fleet
    _bookings: dict[RequestId, Booking] = attrs.field(factory=dict, init=False)
    _held: defaultdict[WorkerId, dict[RequestId, None]] = attrs.field(
        factory=lambda: defaultdict(dict), init=False
    )
    _sheddable: defaultdict[WorkerId, dict[RequestId, None]] = attrs.field(
        factory=lambda: defaultdict(dict), init=False
    )

    _booked: int = attrs.field(default=0, init=False)

    def __contains__(self, id: RequestId) -> bool:
        return id in self._bookings

    def __len__(self) -> int:
        return len(self._bookings)

    def get(self, id: RequestId) -> Booking | None:
        """Return the booking of a request, if it has one."""
        return self._bookings.get(id)

    def on(self, worker: WorkerId) -> list[Booking]:
        """Return the bookings that *worker* holds, oldest first."""
        return [self._bookings[id] for id in self._held.get(worker, ())]

    def held_by(self, id: RequestId, worker: WorkerId) -> Booking | None:
        """Return the booking if *worker* holds it; a late event finds none."""
        booking = self._bookings.get(id)
        if booking is None or worker not in booking.workers:
            return None
        return booking

    def book(self, booking: Booking) -> None:
        """Book a request on its workers, anew or as it was when released."""
        id = booking.request.id
        self._bookings[id] = booking
        if not booking.serial:
            self._booked += 1
            booking.serial = self._booked
        booking.booked = True
        lasting = booking.streamed and not booking.request.resumable
        for worker in booking.workers:
            self._held[worker][id] = None
            if booking.request.sheddable and not lasting:
                self._sheddable[worker][id] = None
            self._add(worker, "running_requests", 1)
            self._add(worker, "waiting_requests", 1)
        if booking.streamed:
            self._add(booking.decision.decode, "waiting_requests", -1)
        self._add(booking.decision.first, "prefill_tokens", booking.prefill_tokens)
        self._add(booking.decision.decode, "context_tokens", booking.context_tokens)

    def put_back(self, released: Sequence[Booking]) -> None:
        """Book again what was released just now, each where it stood."""
        touched: dict[WorkerId, None] = {}
        for booking in released:
            self.book(booking)
            touched |= dict.fromkeys(booking.workers)
        for worker in touched:
            for page in (self._held, self._sheddable):
                in_order = sorted(page.get(worker, ()), key=self._serial)
                page[worker] = dict.fromkeys(in_order)

    def _serial(self, id: RequestId) -> int:
        return self._bookings[id].serial

    def prefill_done(self, booking: Booking) -> None:
        """Release what the prompt took, and the prefill worker if separate."""
        if booking.prefilled:
            return
        decision = booking.decision
        self._add(decision.first, "prefill_tokens", -booking.prefill_tokens)
        booking.prefill_tokens = 0
        for worker in booking.workers:
            if worker != decision.decode:
                self._let_go(worker, booking)
        booking.prefilled = True

    def first_token(self, booking: Booking) -> None:
        """Note that the answer began."""
        self.prefill_done(booking)
        if not booking.streamed:
            booking.streamed = True
            if not booking.request.resumable:
                self._keep(booking.decision.decode, booking)
            self._add(booking.decision.decode, "waiting_requests", -1)
            self.generated(booking, 1)

    def generated(self, booking: Booking, tokens: int) -> None:
        """Note *tokens* more of output."""
        booking.context_tokens += tokens
        booking.generated_tokens += tokens
        self._add(booking.decision.decode, "context_tokens", tokens)

    def release(self, booking: Booking) -> None:
        """End a booking; what gone workers held is gone with them.

        The booking itself is as before, so that it can be booked again.
        """
        decision = booking.decision
        self._add(decision.first, "prefill_tokens", -booking.prefill_tokens)
        if booking.streamed:
            self._add(decision.decode, "waiting_requests", 1)
        for worker in booking.workers:
            self._let_go(worker, booking)
        self._add(decision.decode, "context_tokens", -booking.context_tokens)
        del self._bookings[booking.request.id]
        booking.booked = False

    def sheddable(self, worker: WorkerId) -> Iterator[Booking]:
        """Yield what *worker* may shed, the newest first.

        It streamed nothing, or can be resumed.
        """
        for id in reversed([*self._sheddable.get(worker, ())]):
            yield self._bookings[id]

    def close(self, worker: WorkerId) -> None:
        """Forget an empty page: *worker* is gone."""
        self._held.pop(worker, None)
        self._sheddable.pop(worker, None)

    def _let_go(self, worker: WorkerId, booking: Booking) -> None:
        self._held[worker].pop(booking.request.id, None)
        self._keep(worker, booking)
        self._add(worker, "running_requests", -1)
        self._add(worker, "waiting_requests", -1)

    def _keep(self, worker: WorkerId, booking: Booking) -> None:
        """Note that *booking* is not to be shed on *worker* any more."""
        if booking.request.sheddable:
            self._sheddable[worker].pop(booking.request.id, None)

    def _add(self, worker: WorkerId, column: str, amount: int) -> None:
        row = self.fleet.row(worker)
        if row is not None:
            self.fleet.columns[column][row] += amount
