"""How long a step takes: the time model of one model on one machine."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import TypeVar

import attrs
import numpy as np

from ..amounts import as_real
from ..errors import InvalidHardware, shown
from ..types import Tier
from ..view import Floats
from .detect import Answers, detect
from .hardware import H200, Hardware
from .shape import QWEN25_7B, Shape

Amount = TypeVar("Amount", float, Floats)

# A step takes some time, however short: time goes on.  Powers of floors to a
# higher knee are no numbers any more.
_ANY, _FLOOR = (0.0, sys.float_info.max), (1e-15, sys.float_info.max)
_TIME, _PART = (0.0, 3600.0), (0.0, 100.0)
_BOUNDS = {
    "prefill_floor_s": _FLOOR,
    "decode_floor_s": _FLOOR,
    "host_s": _TIME,
    "host_s_per_request": _TIME,
    "hot_slowdown": _PART,
    "graph_tokens": (0.0, math.inf),
    "graph_floor_s": _FLOOR,
    "knee": (1.0, 20.0),
    "prefill_s_per_token": _ANY,
    "attention_s_per_token2": _ANY,
    "prefix_s_per_token": _ANY,
    "decode_s_per_request": _ANY,
    "decode_s_per_context_token": _ANY,
    "shared_read": (0.0, 1.0),
    "kv_bytes_per_token": _ANY,
    "weights_bytes": _ANY,
}


@attrs.frozen(kw_only=True)
class Efficiency:
    """Which part of a GPU's published peaks an engine reaches.

    The defaults are what the fits of Llama 3.1 8B and Qwen3 8B on an H200 give
    (vLLM 0.24 kernels); `benchmarks/machines.py` prints them.

    Attributes:
        compute: Of the bf16 peak, in matrix products.
        attention: Of the bf16 peak, in attention over a prompt.
        memory: Of the memory bandwidth, in reading the KV cache.
        weights: Of the memory bandwidth, in reading weights.
        layer_s: Seconds a layer takes beside that, however little there is to do.
        request_s: Seconds one request adds to a step: sampling and such.
        knee: As of `Machine`.
    """

    compute: float = 0.68
    attention: float = 0.68
    memory: float = 0.92
    weights: float = 0.86
    layer_s: float = 45e-6
    request_s: float = 4e-6
    knee: float = 2.0


@attrs.frozen(kw_only=True)
class Machine:
    """Step times of one model on one machine, in a closed form.

        products   = norm(floor, prefill_s_per_token * tokens of the step)
        step       = products + attention + requests + context read

    A step reads all weights, which sets a floor, and computes with them, which
    is proportional to its tokens; norm, (a**knee + b**knee) ** (1 / knee), is
    how the one passes into the other.  A step with part of a prompt in it has
    a floor of its own, since engines often run it without CUDA graphs, and one
    that is small enough for them another: beyond, the host launches each kernel,
    however little each has to do.

    Where `host_s` is given, floors of steps with prompts are the host's, who makes
    a step ready while the one before runs, and looks at what came of that when it
    has: `llmd.sim.pace` says what follows.  And a GPU that computes prompts all the
    time reaches its power limit and slows down by `hot_slowdown`.

    The default is the shape of Qwen2.5 7B in bf16 on one H200, vLLM 0.26, CUDA
    graphs for decode only, fitted to `llmd.machines.measured`.

    Attributes:
        name: Of the profile.
        prefill_floor_s: Of a step with part of a prompt, however small.
        decode_floor_s: Of a step without.
        graph_tokens: Tokens of the largest step with part of a prompt that runs
            as a CUDA graph; 0: none does.  vLLM's `max_cudagraph_capture_size`.
        graph_floor_s: Of such a step.
        knee: How sharply the floor ends: 1 adds, 20 takes the larger.
        prefill_s_per_token: Of one token in the matrix products.
        attention_s_per_token2: Of one prompt token looking at one before it.
        prefix_s_per_token: Of each cached token ahead of a prompt's part:
            block tables and hashes, on the CPU.
        decode_s_per_request: Of one more request in the batch, its token in
            the matrix products not counted.
        decode_s_per_context_token: Of reading one more token of context.
        shared_read: What it costs to read one that another request of the batch
            reads as well, of what it costs alone: the second finds it in the GPU's
            cache.  The simulator knows who shares what; `step_s` does not.
        host_s: For which a step without a prompt keeps the host busy; 0: it is not
            told apart, floors are as if the GPU's.
        host_s_per_request: For which one more request that generates does, whether
            part of a prompt is beside it or not.
        hot_slowdown: By which part prompts take longer on a GPU that has done nothing
            else for some tenths of a second.
        kv_bytes_per_token: KV of one token, all layers.
        weights_bytes: Of the model.
        hardware: What it runs on.

    Raises:
        InvalidHardware: An amount is negative, no number or absurd, a floor is 0, or
            the knee is not between 1 and 20.

    >>> machine = Machine()
    >>> 0.04 < machine.prefill_s(2048) < 0.06
    True
    >>> machine.step_s(2048, 0, 64, 64_000) > machine.decode_s(64, 64_000)
    True
    """

    name: str = "h200/qwen2.5-7b"
    prefill_floor_s: float = 18.38e-3
    decode_floor_s: float = 4.83e-3
    graph_tokens: float = 0.0
    graph_floor_s: float = 7.3e-3
    knee: float = 2.5
    prefill_s_per_token: float = 20.69e-6
    attention_s_per_token2: float = 0.7895e-9
    prefix_s_per_token: float = 0.6119e-6
    decode_s_per_request: float = 5.047e-6
    decode_s_per_context_token: float = 11.97e-9
    shared_read: float = 1.0
    host_s: float = 0.0
    host_s_per_request: float = 0.0
    hot_slowdown: float = 0.0
    kv_bytes_per_token: float = QWEN25_7B.kv_bytes_per_token
    weights_bytes: float = QWEN25_7B.weights_bytes
    hardware: Hardware = H200

    def __attrs_post_init__(self) -> None:
        if isinstance(self.knee, np.ndarray) and self.knee.ndim:
            return  # of a whole fleet, made of machines that were looked at
        for name, (least, most) in _BOUNDS.items():
            value = as_real(given := getattr(self, name))
            if not least <= value <= most:
                raise InvalidHardware(
                    f"Machine.{name} is {shown(given)}, must be {least} to {most:.4g}"
                )
            object.__setattr__(self, name, value)

    @classmethod
    def of(
        cls, hardware: Hardware, shape: Shape, efficiency: Efficiency | None = None
    ) -> Machine:
        """Predict step times from published peaks, where nothing was measured."""
        part = efficiency or Efficiency()
        flops = hardware.bf16_flops_per_s
        read = (shape.layer_weights + shape.head_weights) * shape.weight_bytes
        floor = (
            read / (hardware.memory_bytes_per_s * part.weights)
            + shape.layers * part.layer_s
        )
        kv_rate = hardware.memory_bytes_per_s * part.memory
        return cls(
            name=f"{hardware.name}/{shape.name}",
            prefill_floor_s=floor,
            decode_floor_s=floor,
            graph_floor_s=floor,
            knee=part.knee,
            prefill_s_per_token=2 * shape.layer_weights / (flops * part.compute),
            attention_s_per_token2=shape.attention_flops / (flops * part.attention),
            prefix_s_per_token=0.0,
            decode_s_per_request=part.request_s,
            decode_s_per_context_token=shape.kv_bytes_per_token / kv_rate,
            kv_bytes_per_token=shape.kv_bytes_per_token,
            weights_bytes=shape.weights_bytes,
            hardware=hardware,
        )

    @classmethod
    def detect(
        cls, answers: Answers | None = None, shape: Shape = QWEN25_7B
    ) -> Machine:
        """Predict step times of a device that NVML describes.

        Args:
            answers: Of `llmd.adapters.nvml.read`; if not given, those of the
                first device here, which needs nvidia-ml-py.
            shape: Of the model.

        Raises:
            UnknownHardware: No profile fits them, or there is no device.
        """
        if answers is None:
            # Adapters stand above this: asked for when called, never on import.
            from ..adapters.nvml import first

            answers = first()
        return cls.of(detect(answers).hardware, shape)

    def prefill_s(self, tokens: Amount, context: Amount | float = 0.0) -> Amount:
        """Return the seconds to compute *tokens* behind *context* cached ones."""
        products = self.prefill_s_per_token * tokens
        attended = tokens * (context + tokens * 0.5)
        return (
            _norm(products, self._floor_s(tokens), self.knee)
            + attended * self.attention_s_per_token2
            + context * self.prefix_s_per_token
        )

    def decode_s(self, requests: float, context_tokens: float) -> float:
        """Return the seconds of one decode step over a batch."""
        return self.step_s(0, 0, requests, context_tokens)

    def step_s(
        self,
        prefill_tokens: float,
        prefill_context: float,
        decode_requests: float,
        context_tokens: float,
        ready: bool = False,
        heat: float = 0.0,
    ) -> float:
        """Return the seconds of one step of a batch.

        Args:
            prefill_tokens: Prompt tokens computed in it.
            prefill_context: Tokens ahead of them; see `merged_context` for
                parts of several prompts.
            decode_requests: Requests that get one more token each.
            context_tokens: Prompt and output tokens of these requests so far.
            ready: The host made it ready before: what that takes does not count.
            heat: How much of the time the GPU has multiplied lately, [0, 1].
        """
        tokens = prefill_tokens + decode_requests
        floor, slower, behind = self.decode_floor_s, 1.0, 0.0
        if prefill_tokens:
            slower += self.hot_slowdown * heat
            if not ready:
                floor = self._floor_s(tokens)
                behind = max(prefill_context, 0.0) * self.prefix_s_per_token
        products = self.prefill_s_per_token * tokens * slower
        attended = prefill_tokens * (prefill_context + prefill_tokens / 2) * slower
        return (
            _norm(products, floor, self.knee)
            + attended * self.attention_s_per_token2
            + behind
            + decode_requests * self.decode_s_per_request
            + context_tokens * self.decode_s_per_context_token
        )

    def busy_s(
        self, prefill_tokens: float, prefill_context: float, decode_requests: float
    ) -> float:
        """Return the seconds for which a step keeps the host busy; as for `step_s`.

        >>> machine = Machine(host_s=3e-3, host_s_per_request=20e-6)
        >>> round(machine.busy_s(0, 0, 50), 6), round(machine.busy_s(100, 0, 50), 6)
        (0.004, 0.01938)
        """
        beside = self.host_s_per_request * decode_requests
        if not prefill_tokens:
            return self.host_s + beside
        floor = self._floor_s(prefill_tokens + decode_requests)
        return float(
            floor + beside + max(prefill_context, 0.0) * self.prefix_s_per_token
        )

    def _floor_s(self, tokens: Amount) -> Amount | float:
        """Return the floor of steps with part of a prompt and *tokens* in all."""
        floors = self.graph_floor_s, self.prefill_floor_s
        small = (tokens <= self.graph_tokens) & (self.graph_tokens > 0)
        if isinstance(small, np.ndarray):
            chosen: Floats = np.where(small, *floors)
            return chosen
        return floors[0] if small else floors[1]

    @property
    def load_bytes_per_s(self) -> tuple[float, float, float]:
        """Rates from CPU memory, disk and a remote worker into the GPU."""
        hardware = self.hardware
        return (
            hardware.host.in_bytes_per_s,
            hardware.disk_bytes_per_s,
            hardware.network_bytes_per_s,
        )

    def load_s_per_token(self, tier: Tier) -> float:
        """Return the seconds to bring one token's KV from *tier* to the GPU."""
        if tier is Tier.GPU:
            return 0.0
        return self.kv_bytes_per_token / self.load_bytes_per_s[tier - 1]


def _norm(amount: Amount, floor: Amount | float, knee: float) -> Amount:
    joined: Amount = (amount**knee + floor**knee) ** (1 / knee)
    return joined


def merged_context(parts: Iterable[tuple[float, float]]) -> float:
    """Return the one context that costs what several prompts' contexts do.

    Args:
        parts: (tokens, context) of each prompt in the step.

    The result may be negative: two short prompts look at less than one long.

    >>> merged_context([(100, 0), (100, 0)])
    -50.0
    """
    pairs = list(parts)
    tokens = sum(pair[0] for pair in pairs)
    if not tokens:
        return 0.0
    attended = sum(own * (context + own / 2) for own, context in pairs)
    return attended / tokens - tokens / 2
