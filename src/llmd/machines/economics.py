"""What a cached block is worth, and when to fetch rather than to compute."""

from __future__ import annotations

from ..types import Tier
from .machine import Machine


def tier_credit(
    machine: Machine, tier: Tier, tokens: float = 1024, context: float = 0.0
) -> float:
    """Return the worth of tokens in *tier*, in [0, 1]: 1 as good as in the GPU.

    That is 1 - load / recompute, and 0 where loading takes longer.  Routers
    elsewhere use constants for it (0.8 and 0.25, say); here it follows from the
    link, the model and the depth, since deeper tokens cost more to compute.

    >>> from llmd.machines import GH200_96, H200, Machine
    >>> from llmd.machines.shape import QWEN25_7B
    >>> credits = [
    ...     tier_credit(Machine.of(hardware, QWEN25_7B), Tier.CPU)
    ...     for hardware in (GH200_96, H200)
    ... ]
    >>> print(*(round(credit, 3) for credit in credits))
    0.99 0.933
    """
    if tier is Tier.GPU:
        return 1.0
    # The floor of a step is paid with or without these tokens.
    computing = machine.prefill_s(tokens, context) - machine.prefill_s(0.0, context)
    loading = machine.load_s_per_token(tier) * tokens
    return max(0.0, 1.0 - loading / computing) if computing > 0 else 0.0


def fetch_gain_s(
    machine: Machine,
    tokens: float,
    bytes_per_s: float,
    *,
    context: float = 0.0,
    latency_s: float = 0.0,
    remote_queue_s: float = 0.0,
) -> float:
    """Return the seconds won by fetching KV instead of computing it here.

    The one formula of a peer's cache and of P/D disaggregation: computing here
    against the wait for the other side and the transfer.

    Args:
        machine: Of the worker that needs the tokens.
        tokens: How many, uncached here.
        bytes_per_s: Of the way from the other worker.
        context: Cached tokens ahead of them.
        latency_s: Of the way, before the first byte.
        remote_queue_s: Until the other worker has them: 0 for a cache, its
            queue and its own prefill for P/D.
    """
    transfer = latency_s + tokens * machine.kv_bytes_per_token / bytes_per_s
    return machine.prefill_s(tokens, context) - transfer - remote_queue_s


def break_even_tokens(
    machine: Machine,
    bytes_per_s: float,
    *,
    latency_s: float = 0.0,
    remote_queue_s: float = 0.0,
    most: int = 1 << 20,
) -> int | None:
    """Return the fewest uncached tokens that are worth a fetch.

    Computing grows faster than linearly and a transfer linearly, so from there
    on every longer prompt is; None if none up to *most* is.  O(log most).

    >>> break_even_tokens(Machine(), 200e9, remote_queue_s=0.1)
    4482
    >>> break_even_tokens(Machine(), 0.09e9) is None  # a transfer by TCP
    True
    """

    def gain(tokens: int) -> float:
        return fetch_gain_s(
            machine,
            tokens,
            bytes_per_s,
            latency_s=latency_s,
            remote_queue_s=remote_queue_s,
        )

    # A slow link loses more and more before attention, which is quadratic,
    # catches up, so the last token is asked first.
    if gain(most) <= 0:
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gain(middle) > 0 else (middle, high)
    return high
