"""The connector in vLLM's worker: gather, offer, fetch, scatter."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs

from ...errors import TransferError
from ...transport.interface import (
    BlocksFreed,
    Fetch,
    KVTransport,
    Offer,
    Report,
    Side,
    TransferEnded,
    TransferId,
)
from .connector_mover import EVERY
from .connector_plan import Load, Plan, Save, to_address, to_text
from .connector_staging import Staging

_log = logging.getLogger(__name__)
_IDLE_WAIT_S = 1e-3


@attrs.define(eq=False)
class _Waiting:
    """A load under way: which blocks of which request its slots are for."""

    load: Load
    slots: list[int]


class WorkerSide:
    """Moves KV between the engine's caches, a staging slab and the peers."""

    def __init__(self, vllm_config: Any) -> None:
        self._vllm_config = vllm_config
        config = vllm_config.kv_transfer_config
        extra = dict(config.kv_connector_extra_config or {})
        self._staging_bytes = int(extra.get("staging_bytes", 256 << 20))
        self._timeout_s = float(extra.get("timeout_s", 10.0))
        self._offer_s = float(extra.get("offer_s", 30.0))
        self._checksums = bool(extra.get("checksums", True))
        self._layerwise = bool(extra.get("layerwise", False))
        self._through_host = bool(extra.get("through_host", False))
        self._staging: Staging | None = None
        self._transport: KVTransport | None = None
        self._woken = threading.Event()
        # Offers wait here for the GPU to have gathered what they offer.
        self._later = ThreadPoolExecutor(1, thread_name_prefix="llmd-offers")
        # Slots of prompts not complete yet; none if there was no room.
        self._saved: dict[TransferId, list[int]] = {}
        # Layers that the present step has gathered.
        self._gathered: set[int] = set()
        # Freed while layers of theirs were still to be gathered.
        self._deferred: list[Report] = []
        self._sent: dict[TransferId, list[int]] = {}
        self._waiting: dict[TransferId, _Waiting] = {}
        self._held: dict[TransferId, list[int]] = {}
        self._ended: set[str] = set()
        self._errors: set[int] = set()
        self._idle = False
        self._rank = "0"

    @property
    def address(self) -> str:
        """Where peers reach this worker."""
        assert self._transport is not None, "asked before the caches were there"
        return to_text(self._transport.address())

    def open(self, caches: Mapping[str, Any]) -> None:
        """Make the staging slab for *caches* and the transport for it.

        Raises:
            TransferError: The caches are of a kind that is not supported.
        """
        from ..nixl import NixlTransport

        key = os.environ.get("LLMD_KV_KEY", "")
        if not key:
            raise TransferError("LLMD_KV_KEY is not set: engines need a key to share")
        self._rank = _rank()
        self._staging = Staging(
            caches,
            self._vllm_config,
            self._staging_bytes,
            through_host=self._through_host,
        )
        self._transport = NixlTransport(
            self._staging.slab(),
            key.encode(),
            settings=self._staging.settings,
            checksums=self._checksums,
            wake=self._woken.set,
        )

    def load(self, plan: Plan) -> None:
        """Begin what *plan* loads, and drop what it drops."""
        self._idle = plan.idle
        transport = self._transport
        if transport is None:
            return
        for id in plan.drops:
            self._drop(id)
        for load in plan.loads:
            try:
                self._fetch(transport, load)
            except TransferError as error:
                _log.warning("%s computes its prompt here: %s", load.request, error)
                self._failed(load)

    def save_layer(self, plan: Plan, name: str) -> None:
        """Gather a layer that was just computed; let it go where it is complete."""
        if not self._layerwise or not plan.saves:
            return
        layer = self._of_staging().names.index(name)
        self._gathered.add(layer)
        for save in plan.saves:
            self._gather(save, slice(layer, layer + 1))

    def save(self, plan: Plan) -> None:
        """Gather what a step has computed; offer the prompts that are complete."""
        if not plan.saves:
            return
        left = set(range(len(self._of_staging().names))) - self._gathered
        whole = not self._gathered
        self._gathered.clear()
        for save in plan.saves:
            # Layers that vLLM told nothing of: all, if it runs a captured graph.
            for layers in [EVERY] if whole else [slice(i, i + 1) for i in left]:
                self._gather(save, layers)
            if save.last:
                self._saved.pop(save.id, None)

    def loaded(self) -> set[str]:
        """Return the requests whose load ended, well or not."""
        if self._idle and self._waiting and not self._woken.is_set():
            # The engine would spin through empty steps; a transfer ends sooner if
            # the thread that carries it has the interpreter.
            self._woken.wait(_IDLE_WAIT_S)
        self._woken.clear()
        self._collect()
        ended, self._ended = self._ended, set()
        return ended

    def take_errors(self) -> set[int]:
        """Return the engine's blocks that hold nothing, each once."""
        errors, self._errors = self._errors, set()
        return errors

    def counts(self) -> dict[str, int]:
        """Return what the transport and the staging slab hold; none before `open`."""
        if self._transport is None:
            return {}
        self._collect()
        slots = self._of_staging().slots
        held = {"staging_slots": slots.count, "free_slots": slots.free}
        return {**self._transport.counts, **held}

    def close(self) -> None:
        """Tell the peers and let go of the slab; idempotent."""
        self._later.shutdown(wait=True, cancel_futures=True)
        if self._transport is not None:
            self._transport.close()

    def _fetch(self, transport: KVTransport, load: Load) -> None:
        peer = transport.connect(to_address(load.address[self._rank]))
        staging = self._of_staging()
        slots = self._take(len(load.blocks))
        if slots is None:
            raise TransferError(f"no {len(load.blocks)} staging slots are free")
        try:
            transport.fetch(
                Fetch(
                    id=load.id,
                    peer=peer,
                    blocks=slots,
                    first=load.first,
                    early=True,
                    timeout_s=self._timeout_s,
                )
            )
        except TransferError:
            staging.slots.give(slots)
            raise
        self._held[load.id] = slots
        if load.blocks:
            self._waiting[load.id] = _Waiting(load, slots)

    def _failed(self, load: Load) -> None:
        if load.blocks:
            self._errors.update(load.blocks)
            self._ended.add(load.request)

    def _gather(self, save: Save, layers: slice) -> None:
        slots = self._slots(save)
        if not slots:
            return
        stop = save.start + len(save.blocks)
        self._of_staging().gather(save.blocks, slots[save.start : stop], layers)
        if save.last:
            self._let_go(save.id, slots, layers)

    def _slots(self, save: Save) -> list[int]:
        """Return the slots of a whole prompt, so that what is written lies together."""
        slots = self._saved.get(save.id)
        if slots is None:
            # A name that is in use was not made by `TransferId.fresh`.
            begins = save.start == 0 and save.id not in self._sent
            slots = (self._take(save.total) if begins else None) or []
            self._saved[save.id] = slots
            if not slots:
                _log.warning("%s is not handed off: staging is full", save.id.request)
                reason = "the prefill engine's staging is full"
                self._transport_of().cancel(save.id, reason)
        return slots

    def _let_go(self, id: TransferId, slots: list[int], layers: slice) -> None:
        """Offer a prompt, and of it the layers that are complete."""
        transport, done = self._transport_of(), self._of_staging().mark()
        count = len(self._of_staging().names)
        if id not in self._sent:
            self._sent[id] = slots
            offer = Offer(
                id=id, blocks=slots, timeout_s=self._offer_s, ready=layers == EVERY
            )
            self._later.submit(_offer, transport, offer, done)
        if layers != EVERY:
            self._later.submit(_ready, transport, id, range(count)[layers], done)

    def _drop(self, id: TransferId) -> None:
        slots = self._saved.pop(id, None)
        if slots is not None:
            self._of_staging().slots.give(slots)
        if self._transport is not None:
            self._transport.cancel(id, "the request ended")

    def _take(self, count: int) -> list[int] | None:
        staging = self._of_staging()
        slots = staging.slots.take(count)
        if slots is None:
            self._collect()
            slots = staging.slots.take(count)
        return slots

    def _collect(self) -> None:
        """Take in what the transport has to tell."""
        if self._transport is None:
            return
        reports, self._deferred = [*self._deferred, *self._transport.poll()], []
        for report in reports:
            if isinstance(report, BlocksFreed) and report.id in self._saved:
                # Given up in its last step, whose other layers still go there.
                self._deferred.append(report)
            elif isinstance(report, BlocksFreed):
                held = self._held if report.side is Side.TARGET else self._sent
                self._of_staging().give_when_done(held.pop(report.id, []))
            elif report.side is Side.TARGET:
                self._arrived(report)

    def _arrived(self, report: TransferEnded) -> None:
        waiting = self._waiting.pop(report.id, None)
        if waiting is None:
            return
        load = waiting.load
        if report.error is None:
            self._of_staging().scatter(waiting.slots, load.blocks)
            self._ended.add(load.request)
            return
        _log.warning("%s computes its prompt here: %s", load.request, report.error)
        self._failed(load)

    def _transport_of(self) -> KVTransport:
        assert self._transport is not None, "a step before the caches were there"
        return self._transport

    def _of_staging(self) -> Staging:
        assert self._staging is not None, "asked before the caches were there"
        return self._staging


def _offer(transport: KVTransport, offer: Offer, done: Any) -> None:
    if done is not None:
        done.synchronize()
    try:
        transport.offer(offer)
    except TransferError as error:
        _log.warning("%s is not handed off: %s", offer.id.request, error)


def _ready(
    transport: KVTransport, id: TransferId, layers: Iterable[int], done: Any
) -> None:
    if done is not None:
        done.synchronize()
    for layer in layers:
        transport.ready(id, layer)


def _rank() -> str:
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return str(get_tensor_model_parallel_rank())
