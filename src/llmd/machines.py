"""What a worker's hardware does in how many seconds."""

from __future__ import annotations

from typing import TypeVar

import attrs

from .types import Tier
from .view import Floats

Amount = TypeVar("Amount", float, Floats)


@attrs.frozen(kw_only=True)
class Machine:
    """Step times of one model on one machine, in a closed form.

    The default is a 7B model in bf16 on one H200, vLLM 0.26 with CUDA graphs:
    fitted to the table of prefill and decode times that docs/machines.md
    gives.

    Attributes:
        name: Of the profile.
        prefill_s_per_token: Of computing a prompt, attention not counted.
        attention_s_per_token2: Of attention, for each token of the prompt and
            each token before it.
        step_s: Of any step, whatever is in it.
        decode_s_per_request: What one more request adds to a decode step.
        decode_s_per_context_token: What one more token of context adds.
        kv_bytes_per_token: KV of one token, all layers.
        load_bytes_per_s: From CPU, disk and a remote worker into the GPU.

    >>> machine = Machine()
    >>> 0.04 < machine.prefill_s(2048) < 0.06
    True
    """

    name: str = "h200-7b"
    prefill_s_per_token: float = 22e-6
    attention_s_per_token2: float = 0.65e-9
    step_s: float = 4.8e-3
    decode_s_per_request: float = 14e-6
    decode_s_per_context_token: float = 12e-9
    kv_bytes_per_token: float = 57_344.0
    load_bytes_per_s: tuple[float, float, float] = (55e9, 5e9, 50e9)

    def prefill_s(self, tokens: Amount, context: Amount | float = 0.0) -> Amount:
        """Return the seconds to compute *tokens* behind *context* cached ones."""
        attended = tokens * (context + tokens / 2.0)
        return (
            self.step_s
            + tokens * self.prefill_s_per_token
            + attended * self.attention_s_per_token2
        )

    def decode_s(self, requests: float, context_tokens: float) -> float:
        """Return the seconds of one decode step over a batch."""
        return (
            self.step_s
            + requests * self.decode_s_per_request
            + context_tokens * self.decode_s_per_context_token
        )

    def load_s_per_token(self, tier: Tier) -> float:
        """Return the seconds to bring one token's KV from *tier* to the GPU."""
        if tier is Tier.GPU:
            return 0.0
        return self.kv_bytes_per_token / self.load_bytes_per_s[tier - 1]
