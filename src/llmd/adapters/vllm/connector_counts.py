"""What `LlmdConnector` holds in a running engine, asked from outside.

    options = {
        "kv_transfer_config": transfer_config(),
        "worker_extension_cls": TransferCounts.NAME,
    }
    ...
    (held,) = await llm.collective_rpc("transfer_counts")

With no transfer under way nothing may be held, or something leaks.
"""

from __future__ import annotations

from typing import Any, ClassVar


class TransferCounts:
    """Gives vLLM's workers a method; vLLM mixes it into their class.

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
