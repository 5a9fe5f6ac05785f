"""A transport between processes over NIXL."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import attrs

from ...errors import TransferError, shown
from ...transport.endpoint import Endpoint
from ...transport.handshake import Address
from ...transport.interface import (
    Fetch,
    KVTransport,
    Offer,
    PeerId,
    Report,
    TransferId,
    as_id,
    as_index,
)
from ...transport.local import drain, held
from ...transport.outbox import Settings
from .calls import Calls
from .carrier import Carrier
from .path import COPIED, Path, PathLog, why_slow
from .slab import Slab

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# On a GPU the largest were fastest, see docs/explanation/kv-on-a-gpu.md; on a CPU
# those that stay in the cache between checksum and copy are.
_SETTINGS = {
    "DRAM": Settings(),
    "VRAM": Settings(piece_bytes=1 << 28, writes_in_flight=8),
}
_SPIN_S = 2e-3
_SHORTEST_NAP_S = 5e-5
_BUSY_NAP_S = 5e-4
_IDLE_NAP_S = 2e-3
_NAP = 1 / 128
"""Of the time for which nothing has moved: after long a little more is nothing."""
_TICK_S = 1e-2
_CLOSE_S = 1.0
_LOOKS = 200
"""At UCX's log for the way it chose, which it writes a little after it does."""
_GOODBYE_STEPS = 20
_CROWDED_S = 2e-4
_CROWDED_RESTS = 100
_PR_SET_TIMERSLACK = 29


class NixlTransport(KVTransport):
    """Pushes blocks of a slab to other processes by one-sided writes.

    One thread owns the NIXL agent, which is not safe for several, and NIXL's own
    progress thread is off: a loop that spins while something moves and naps
    otherwise has a notification across in 12 us, where the progress thread beside
    a busy interpreter takes 8-40 ms.  Calls are handed to that thread and do not
    wait for the network.

    Anyone with *key* may read and write the slab through its peers; NIXL itself
    neither encrypts nor authenticates, so the key guards the way in, not the wire.
    """

    def __init__(
        self,
        slab: Slab,
        key: bytes,
        *,
        settings: Settings | None = None,
        checksums: bool = True,
        wake: Callable[[], object] | None = None,
    ) -> None:
        """Register the slab and start the owner thread.

        Args:
            slab: Stays mapped until `close` has returned.
            key: Shared with all peers, at least 16 bytes.
            settings: How transfers are cut, watched and retried; chosen by the
                kind of memory if not given.
            checksums: Check every block on arrival.
            wake: Called from the owner thread when there is something to poll; it
                may neither wait nor offer, fetch or close.

        Raises:
            TransferError: NIXL or UCX is not there, or refuses the memory; an
                argument is not what it must be.
        """
        _check(slab, key, settings, wake)
        if checksums and slab.sums is None:
            raise TransferError("this slab has no checksums; say checksums=False")
        self._slab, self._wake = slab, wake
        self._endpoint = Endpoint(
            uuid.uuid4().hex,
            key,
            slab.layout,
            slab.blocks,
            slab.sums if checksums else None,
            settings or _SETTINGS[slab.memory],
            summed_by_driver=True,
        )
        self._endpoint.outbox.tell = self._tell
        self._checksums = checksums
        self._calls = Calls()
        self._reports: deque[Report] = deque()
        self._paths = PathLog.begin()
        self._path: Path | None = None
        self._looks = _LOOKS
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._own, args=(started,), name="llmd-nixl", daemon=True
        )
        self._calls.owner = self._thread
        self._thread.start()
        started.result()
        # NIXL aborts a process that exits with an agent at work.
        atexit.register(self.close)

    @property
    def id(self) -> PeerId:
        return self._endpoint.id

    @property
    def counts(self) -> Mapping[str, int]:
        return held(self._endpoint)

    @property
    def path(self) -> Path | None:
        """How the peer written to last is; None before the first write."""
        return self._path

    def address(self) -> bytes:
        return self._endpoint.address

    def connect(self, address: bytes) -> PeerId:
        endpoint = self._endpoint
        found = Address.verify(address, endpoint.key, endpoint.layout)
        self._calls.put(lambda: self._meet(found))
        return found.id

    def offer(self, offer: Offer) -> None:
        self._calls.ask(lambda: self._endpoint.offer(offer, time.monotonic()))

    def ready(self, id: TransferId, layer: int) -> None:
        id, layer = as_id(id), as_index(layer)
        self._calls.put(lambda: self._endpoint.ready(id, layer))

    def fetch(self, fetch: Fetch) -> None:
        self._calls.ask(lambda: self._endpoint.fetch(fetch, time.monotonic()))

    def cancel(self, id: TransferId, reason: str = "cancelled") -> None:
        id, why = as_id(id), str(reason)
        self._calls.put(lambda: self._endpoint.cancel(id, why, time.monotonic()))

    def poll(self) -> list[Report]:
        reports = []
        with contextlib.suppress(IndexError):
            while True:
                reports.append(self._reports.popleft())
        return reports

    def close(self) -> None:
        self._calls.expect_another_thread()
        self._calls.end("the transport is closed")
        self._thread.join()
        self._reports.extend(drain(self._endpoint))
        atexit.unregister(self.close)

    # What follows runs in the owner thread.

    def _own(self, started: Future[None]) -> None:
        wake_on_time()
        try:
            self._carrier = Carrier(self._endpoint, self._slab, self._checksums)
        except Exception as error:
            started.set_exception(TransferError(f"NIXL cannot start: {error}"))
            return
        started.set_result(None)
        reason = ""
        try:
            self._serve()
        except Exception as error:
            # A fault of ours: nobody may wait for ever for what is open.
            _log.exception("the transport fails")
            reason = f"the transport failed: {error!r}"
            self._calls.end(reason)
        try:
            self._wind_up(reason)
        except Exception:
            _log.exception("the transport is left as it is")

    def _serve(self) -> None:
        """Do what is asked for, until the end."""
        rest = Rest()
        moved_at = ticked_at = time.monotonic()
        while not self._calls.refusal:
            now = time.monotonic()
            if self._step(now):
                moved_at = now
            if now - ticked_at >= _TICK_S:
                ticked_at = now
                self._tick(now)
            if now - moved_at >= _SPIN_S:
                self._nap(now - moved_at)
            elif not self._calls.watch(self._carrier.words()):
                rest()

    def _step(self, now: float) -> bool:
        """Do what there is to do; return whether there was anything."""
        moved = self._calls.take()
        if moved:
            self._carrier.carry()
        moved |= self._carrier.step(now)
        self._carrier.carry()
        if self._endpoint.outbox.reports:
            self._tell()
        return moved

    def _tell(self) -> None:
        """Let the user have the reports."""
        reports = self._endpoint.outbox.reports
        self._reports.extend(reports)
        reports.clear()
        if self._wake is not None:
            try:
                self._wake()
            except Exception:  # of the user, to whom this thread does not belong
                _log.exception("the wake of a transport raised")

    def _tick(self, now: float) -> None:
        self._endpoint.tick(now)
        if self._carrier.written:
            self._look_at_path()

    def _look_at_path(self) -> None:
        if self._carrier.copied:
            self._path = COPIED
            return
        if self._path is COPIED:
            self._path = None
        if self._path is None and self._paths is not None and self._looks > 0:
            self._looks -= 1
            self._path = self._paths.write_path(self._slab.memory)
            if self._path is not None and self._path.slow:
                near = self._path.between != "inter-node"
                cause = why_slow(self._slab.memory, same_host=near)
                _log.warning("blocks go over %s: %s", self._path.lanes, cause)

    def _nap(self, quiet_s: float) -> None:
        counts = held(self._endpoint)
        if counts["offers"] or counts["fetches"]:  # loose writes can wait
            nap_s = min(max(quiet_s * _NAP, _SHORTEST_NAP_S), _BUSY_NAP_S)
        else:
            nap_s = _IDLE_NAP_S
        self._calls.nap(nap_s)

    def _meet(self, address: Address) -> None:
        now = time.monotonic()
        if self._carrier.reach(address, now):
            self._endpoint.meet(address.id, now)

    def _wind_up(self, reason: str) -> None:
        """End everything, and leave only when no peer can write here any more."""
        until = time.monotonic() + _CLOSE_S
        self._endpoint.close(time.monotonic(), reason)
        while time.monotonic() < until:
            self._step(time.monotonic())
            counts = held(self._endpoint)
            if not counts["writes"] and not counts["fetches"]:
                break
            time.sleep(_SHORTEST_NAP_S)
        self._endpoint.goodbye()
        self._carrier.carry()
        for _ in range(_GOODBYE_STEPS):  # UCX sends only when it is looked at
            self._carrier.step(time.monotonic())
            time.sleep(_SHORTEST_NAP_S)
        self._carrier.close()


def _check(slab: Any, key: Any, settings: Any, wake: Any) -> None:
    if not isinstance(slab, Slab):
        raise TransferError(f"{shown(slab)} is no slab")
    if settings is not None and not isinstance(settings, Settings):
        raise TransferError(f"{shown(settings)} are no settings")
    if wake is not None and not callable(wake):
        raise TransferError(f"wake is {shown(wake)}, must be callable")
    if not isinstance(key, bytes) or len(key) < 16:
        raise TransferError("the key is too short to guard anything")


@attrs.define
class Rest:
    """Between two looks of a thread that spins: lets others go on.

    Yielding keeps the core awake, where a nap, however short, lets it idle, and
    waking it up takes longer than a small transfer.  But who yields while others
    want the core is let in last, after milliseconds; who naps is let in first.

    >>> Rest()()
    """

    _naps: int = 0

    def __call__(self) -> None:
        """Rest for a moment."""
        if self._naps:
            self._naps -= 1
            time.sleep(0)
            return
        begun = time.monotonic()
        os.sched_yield()
        if time.monotonic() - begun > _CROWDED_S:
            self._naps = _CROWDED_RESTS


def wake_on_time() -> None:
    """Let naps of this thread end when they should, where Linux is asked.

    By default Linux may end a nap 50 us late to save power, `time.sleep(0)` too,
    which is most of what a small transfer takes.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
