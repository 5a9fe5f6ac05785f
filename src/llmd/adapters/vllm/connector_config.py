"""What vLLM must be told to load a connector; needs no vLLM itself."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from ...amounts import as_real
from ...errors import EngineError, TransferError, shown
from ...transport.interface import LONGEST_S

PORT, _HOST = "VLLM_NIXL_SIDE_CHANNEL_PORT", "VLLM_NIXL_SIDE_CHANNEL_HOST"
_MOST_PORT = 65_535
_ROLES = ("kv_producer", "kv_consumer", "kv_both")


def transfer_config(
    *,
    role: str = "kv_both",
    staging_bytes: int = 256 << 20,
    timeout_s: float = 10.0,
    offer_s: float = 30.0,
    checksums: bool = True,
    layerwise: bool = False,
    through_host: bool = False,
) -> dict[str, Any]:
    """Return the `kv_transfer_config` with which vLLM loads `LlmdConnector`.

    The key that engines share is read from the environment of the engine,
    `LLMD_KV_KEY`, as vLLM prints its configuration to its log.

    Args:
        role: "kv_producer", "kv_consumer" or "kv_both".
        staging_bytes: Of the slab that blocks pass through.
        timeout_s: After which the decode engine computes the prompt itself.
        offer_s: How long the prefill engine keeps a prompt's KV in staging.
        checksums: Check every block on arrival.
        layerwise: Let each layer go while later ones compute, to a decode engine
            that has asked already; otherwise all go when the prompt is complete.
        through_host: Stage in host memory, where one GPU cannot map the other's:
            `choose_way` says `Way.HOST`, for example between MIG instances.

    Raises:
        TransferError: There is no such role, a time is not in 0..1e6 s, or there is
            no staging.

    >>> transfer_config(role="kv_producer")["kv_load_failure_policy"]
    'recompute'
    """
    _check_role(role)
    for name, seconds in (("timeout_s", timeout_s), ("offer_s", offer_s)):
        if not 0 <= as_real(seconds) <= LONGEST_S:
            raise TransferError(f"{name} is {seconds!r}, must be in 0..{LONGEST_S:g}")
    if not as_real(staging_bytes) > 0:
        raise TransferError(f"staging_bytes is {staging_bytes!r}, must be above 0")
    return {
        "kv_connector": "LlmdConnector",
        "kv_connector_module_path": "llmd.adapters.vllm.connector",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "staging_bytes": staging_bytes,
            "timeout_s": timeout_s,
            "offer_s": offer_s,
            "checksums": checksums,
            "layerwise": layerwise,
            "through_host": through_host,
        },
    }


def ours(config: Any) -> bool:
    """Say whether a `kv_transfer_config` loads `LlmdConnector`.

    >>> ours(transfer_config()), ours(nixl_config()), ours(None)
    (True, False, False)
    """
    return isinstance(config, dict) and config.get("kv_connector") == "LlmdConnector"


def layerwise(config: Any) -> bool:
    """Say whether it lets each layer go while later ones compute.

    >>> layerwise(transfer_config(layerwise=True)), layerwise(transfer_config())
    (True, False)
    """
    extra = config.get("kv_connector_extra_config") if ours(config) else None
    return bool(extra and extra.get("layerwise"))


def nixl_config(
    *, role: str = "kv_both", push: bool = False, lease_s: int = 30, cpu: bool = False
) -> dict[str, Any]:
    """Return the `kv_transfer_config` for vLLM's own NIXL connector, guarded.

    Engines find each other at `VLLM_NIXL_SIDE_CHANNEL_HOST`, from the environment
    of each, and a port of its own: `VLLM_NIXL_SIDE_CHANNEL_PORT` if that is set
    (plus its data-parallel rank; taken by another, the engine does not start), else
    any that is free.

    Args:
        role: "kv_producer", "kv_consumer" or "kv_both".
        push: The prefill engine writes; otherwise the decode engine reads.
        lease_s: How long the prefill engine keeps blocks nobody asked for.
        cpu: The engine runs on a CPU.

    Raises:
        TransferError: There is no such role, or the lease is not 1..1e6 s.

    >>> nixl_config(push=True)["kv_connector"]
    'LlmdNixlPush'
    """
    _check_role(role)
    if not 1 <= as_real(lease_s) <= LONGEST_S:
        raise TransferError(f"lease_s is {shown(lease_s)}, must be in 1..{LONGEST_S:g}")
    return {
        "kv_connector": "LlmdNixlPush" if push else "LlmdNixlPull",
        "kv_connector_module_path": "llmd.adapters.vllm.connector_nixl",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kv_lease_duration": lease_s},
        **({"kv_buffer_device": "cpu"} if cpu else {}),
    }


def side_port(host: str, port: int) -> int:
    """Return *port*, or any if it is 0, that vLLM's connector can listen at.

    It would itself wait for ever for a listener that found its port taken.

    Raises:
        EngineError: It cannot; says why.

    >>> side_port("127.0.0.1", 0) > 1023
    True
    """
    if not 0 <= port <= _MOST_PORT:
        raise EngineError(f"{PORT} is {port}, must be in 0..{_MOST_PORT}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as found:
            return int(found.getsockname()[1])
    except OSError as error:
        raise EngineError(f"{PORT} {port} of {host}: {error}") from error


def check_side_channel(config: Any, environment: Mapping[str, str]) -> None:
    """See whether vLLM's NIXL connector can listen where it is told to.

    Raises:
        EngineError: It cannot; says why.
    """
    if not isinstance(config, dict) or PORT not in environment:
        return
    if str(config.get("kv_connector")).startswith("LlmdNixl"):
        if not environment[PORT].isdigit():
            raise EngineError(f"{PORT} is {environment[PORT]!r}")
        side_port(environment.get(_HOST, "localhost"), int(environment[PORT]))


def _check_role(role: Any) -> None:
    if role not in _ROLES:
        raise TransferError(f"role is {shown(role)}, must be one of {_ROLES}")
