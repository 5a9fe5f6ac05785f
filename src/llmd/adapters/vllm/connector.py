"""vLLM's KV connector on top of a `KVTransport`.

    prefill engine                                   decode engine
    each step: gather what it computed               asks for the blocks,
      into a staging slab                              into its own staging slab
    prompt done: offer it,          <-- fetch --
      or in its last step, layer by layer
                                    == write ==>     verified: scatter into
                                                       the request's blocks

Remote writes land in staging, never in an engine's own blocks.  So an engine's
blocks are its own again as soon as a prompt is computed, there is no lease on
them that could run out, and a peer that hangs keeps nothing but staging slots
in quarantine.  Whatever fails, the decode engine computes the prompt itself.

vLLM loads one class for both of its roles; each is a class of its own here.
Works with vLLM 0.26 and 0.32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
)

from .connector_config import transfer_config
from .connector_plan import Addresses, Plan
from .connector_scheduler import SchedulerSide
from .connector_worker import WorkerSide

__all__ = ["LlmdConnector", "transfer_config"]


class LlmdConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """The class that vLLM loads; `transfer_config` says how.

    >>> LlmdConnector.__name__
    'LlmdConnector'
    """

    def __init__(
        self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: Any = None
        self._worker: Any = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(vllm_config)
        else:
            self._worker = WorkerSide(vllm_config)

    # In the scheduler.

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        tokens = self._scheduler.loadable(request, num_computed_tokens)
        return tokens, tokens > 0

    def update_state_after_alloc(
        self, request: Any, blocks: Any, num_external_tokens: int
    ) -> None:
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Plan:
        plan: Plan = self._scheduler.plan(scheduler_output)
        return plan

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduler.finished(request)

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        self._scheduler.addresses = {
            str(rank): found.address for rank, found in metadata.items()
        }

    @property
    def requires_kv_delivery(self) -> bool:
        """A hand-off that does not happen is a prompt computed again, no more."""
        return False

    # In the worker.

    @property
    def counts(self) -> dict[str, int]:
        """What the worker holds; see `TransferCounts`."""
        counts: dict[str, int] = self._worker.counts()
        return counts

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        self._worker.open(kv_caches)

    def get_handshake_metadata(self) -> Addresses | None:
        return None if self._worker is None else Addresses(self._worker.address)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._worker.load(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads end between steps: there is nothing to wait for."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        self._worker.save_layer(self._get_connector_metadata(), layer_name)

    def wait_for_save(self) -> None:
        self._worker.save(self._get_connector_metadata())

    def get_finished(
        self, finished_req_ids: set[str]
    ) -> tuple[set[str] | None, set[str] | None]:
        return None, self._worker.loaded() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        damaged: set[int] = self._worker.take_errors()
        return damaged

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
