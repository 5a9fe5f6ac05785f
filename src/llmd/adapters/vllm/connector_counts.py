"""What `LlmdConnector` holds in a running engine, asked from outside."""

from __future__ import annotations

from typing import Any, ClassVar


class TransferCounts:
    """A method for vLLM's workers, which vLLM mixes into their class.

    With no transfer under way `offers`, `fetches`, `writes` and
    `quarantined_blocks` are 0 and all slots are free, or something leaks.
    `VllmEngine.transfer_counts` asks for it; elsewhere it is for vLLM's option
    `worker_extension_cls` and its `collective_rpc`.

    >>> TransferCounts.NAME
    'llmd.adapters.vllm.connector_counts.TransferCounts'
    """

    NAME: ClassVar[str] = f"{__name__}.TransferCounts"

    def transfer_counts(self) -> dict[str, Any]:
        """Return `KVTransport.counts`, and staging slots in all and free.

        Raises:
            TypeError: The engine has another connector, or none yet.
        """
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        from .connector import LlmdConnector

        connector = get_kv_transfer_group()
        if not isinstance(connector, LlmdConnector):
            raise TypeError(f"the connector is a {type(connector).__name__}")
        return connector.counts
