"""vLLM's own NIXL connectors, kept from reading what is no longer there.

A decode engine that reads after the prefill engine's lease on the blocks has run
out, and they were reused, answers with wrong tokens and no error (seen with vLLM
0.32 on real engines).  So each hand-off carries the time until which it may begin,
half its lease; one that begins in time is kept alive by the connector's own
heartbeats, and one that does not is computed by the decode engine itself.

The time is the host's clock: engines on several hosts need clocks that agree to
well under half the lease.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl import (
    NixlConnector,
    NixlPushConnector,
)

from .connector_config import PORT, side_port

_log = logging.getLogger(__name__)
_UNTIL = "llmd_until"


def marked(
    params: Mapping[str, Any] | None, lease_s: float, now: float
) -> dict[str, Any] | None:
    """Return *params* with the time until which the hand-off may begin.

    >>> marked({"do_remote_prefill": True}, lease_s=30.0, now=100.0)["llmd_until"]
    115.0
    """
    return None if params is None else {**params, _UNTIL: now + lease_s / 2}


def lapsed(params: Mapping[str, Any] | None, now: float) -> bool:
    """Say whether a hand-off may not begin any more.

    >>> lapsed({"do_remote_prefill": True, "llmd_until": 115.0}, now=116.0)
    True
    """
    if not params or not params.get("do_remote_prefill"):
        return False
    return bool(now > params.get(_UNTIL, float("inf")))


class _Guard:
    """Marks what a prefill engine hands over and refuses what has lapsed."""

    def set_xfer_handshake_metadata(self, metadata: Any) -> None:
        self._listen()
        super().set_xfer_handshake_metadata(metadata)  # type: ignore[misc]

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Any) -> None:
        self._listen()
        super().set_xfer_handshake_metadata_pp_aware(metadata)  # type: ignore[misc]

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        params = request.kv_transfer_params
        if lapsed(params, time.time()):
            _log.warning(
                "%s computes its prompt here: its hand-off lapsed", request.request_id
            )
            # The prefill engine's blocks free themselves; nothing may touch them.
            params["do_remote_prefill"] = False
            return 0, False
        found: tuple[int | None, bool] = super().get_num_new_matched_tokens(  # type: ignore[misc]
            request, num_computed_tokens
        )
        return found

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        delayed, params = super().request_finished(request, block_ids)  # type: ignore[misc]
        return delayed, marked(params, self._lease_s(), time.time())

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        delayed, params = super().request_finished_all_groups(request, block_ids)  # type: ignore[misc]
        return delayed, marked(params, self._lease_s(), time.time())

    def _listen(self) -> None:
        """Choose the port where vLLM's connector is about to listen."""
        side = self.connector_scheduler  # type: ignore[attr-defined]
        wanted = side.side_channel_port if PORT in os.environ else 0
        side.side_channel_port = side_port(side.side_channel_host, wanted)

    def _lease_s(self) -> float:
        config = self.kv_transfer_config  # type: ignore[attr-defined]
        return float(config.get_from_extra_config("kv_lease_duration", 30))


class LlmdNixlPull(_Guard, NixlConnector):  # type: ignore[misc]
    """vLLM's pull connector, guarded; `nixl_config` says how to load it.

    >>> issubclass(LlmdNixlPull, NixlConnector)
    True
    """


class LlmdNixlPush(_Guard, NixlPushConnector):  # type: ignore[misc]
    """vLLM's push connector, guarded.

    >>> issubclass(LlmdNixlPush, NixlPushConnector)
    True
    """
