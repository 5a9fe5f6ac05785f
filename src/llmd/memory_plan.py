"""Share one GPU's memory among engines that no driver keeps apart.

Time slicing gives no isolation: each engine takes what it is told to, and the
last one to start fails if the sum was wrong.  So the sum is done first, and
shown when it does not come out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from .errors import DoesNotFit, InvalidSlice
from .machines.hardware import GIB, Hardware
from .machines.shape import Shape
from .timeslice.amounts import amount

CONTEXT_BYTES = 0.6 * GIB
"""CUDA context and libraries of one process, awake or asleep: assumed, not yet
measured; `benchmarks/gpu/timeslice.py` reports what a sleeping engine holds."""

ACTIVATION_BYTES = 2.0 * GIB
"""Activations of a step and CUDA graphs: assumed for a 7B model and steps of
2048 tokens.  vLLM prints what its profiling run finds; give that instead."""


@attrs.frozen(kw_only=True)
class Need:
    """What one engine wants.

    Attributes:
        name: Of the engine.
        weights_bytes: Of its model.
        kv_bytes_per_token: Of its model.
        kv_tokens: Context of all its running requests together.
        max_model_tokens: Of its longest request; must fit the KV cache.
        activation_bytes: Beside weights and KV, while it runs.

    Raises:
        InvalidSlice: A size is a NaN, negative or infinite; it is named.
        DoesNotFit: The KV cache holds no request of that length.

    >>> from llmd.machines.shape import QWEN25_7B
    >>> Need.of("a", QWEN25_7B, kv_tokens=100_000, max_model_tokens=32_768).kv_bytes
    5734400000.0
    """

    name: str
    weights_bytes: float = attrs.field(validator=amount())
    kv_bytes_per_token: float = attrs.field(validator=amount())
    kv_tokens: int = attrs.field(validator=amount(1))
    max_model_tokens: int = attrs.field(default=1, validator=amount(1))
    activation_bytes: float = attrs.field(default=ACTIVATION_BYTES, validator=amount())

    def __attrs_post_init__(self) -> None:
        if self.kv_tokens < self.max_model_tokens:
            raise DoesNotFit(
                f"{self.name}: KV for {self.kv_tokens} tokens holds no request of"
                f" {self.max_model_tokens}: want more KV or a shorter max_model_len"
            )

    @classmethod
    def of(
        cls, name: str, shape: Shape, *, kv_tokens: int, max_model_tokens: int
    ) -> Need:
        """Take sizes from a model's shape."""
        return cls(
            name=name,
            weights_bytes=shape.weights_bytes,
            kv_bytes_per_token=shape.kv_bytes_per_token,
            kv_tokens=kv_tokens,
            max_model_tokens=max_model_tokens,
        )

    @property
    def kv_bytes(self) -> float:
        """Of the KV cache it wants."""
        return self.kv_tokens * self.kv_bytes_per_token

    @property
    def awake_bytes(self) -> float:
        """What it holds while awake."""
        parts = (self.weights_bytes, self.kv_bytes, self.activation_bytes)
        return CONTEXT_BYTES + sum(parts)


@attrs.frozen(kw_only=True)
class Part:
    """What one engine gets.

    Attributes:
        need: What it wanted.
        gpu_memory_utilization: Part of the whole GPU for all of it but its
            context, as vLLM counts.
        sleeps: It must be put to sleep between its turns.
    """

    need: Need
    gpu_memory_utilization: float
    sleeps: bool

    def options(self) -> Mapping[str, Any]:
        """Return vLLM's engine arguments for it."""
        options: dict[str, Any] = {
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "kv_cache_memory_bytes": int(self.need.kv_bytes),
        }
        if self.need.max_model_tokens > 1:
            options["max_model_len"] = self.need.max_model_tokens
        if self.sleeps:
            options["enable_sleep_mode"] = True
        return options


@attrs.frozen(kw_only=True)
class MemoryPlan:
    """Who gets what; see `plan_memory`.

    Attributes:
        parts: One an engine, in the order asked for.
        free_bytes: Left when the most that is ever awake together is.
        arithmetic: The sum, in lines.
    """

    parts: tuple[Part, ...]
    free_bytes: float
    arithmetic: tuple[str, ...]

    def __getitem__(self, name: str) -> Part:
        for part in self.parts:
            if part.need.name == name:
                return part
        raise InvalidSlice(f"the plan has no engine {name!r}")


def plan_memory(
    hardware: Hardware,
    needs: Sequence[Need],
    *,
    in_turns: bool = False,
    reserve: float = 0.03,
) -> MemoryPlan:
    """Plan the memory of engines on one GPU.

    Args:
        hardware: The GPU.
        needs: The engines.
        in_turns: Only one is awake at a time; the others sleep and keep no more
            than their context.  Otherwise all are resident together.
        reserve: Part of the memory that nobody gets, in [0, 1).

    Raises:
        DoesNotFit: They need more than there is.  The message is the sum, and
            says whether taking turns would help.
        InvalidSlice: Two have one name, or *reserve* is out of its range.

    >>> from llmd.machines import H200
    >>> from llmd.machines.shape import QWEN25_7B
    >>> pair = [
    ...     Need.of(name, QWEN25_7B, kv_tokens=500_000, max_model_tokens=32_768)
    ...     for name in ("a", "b")
    ... ]
    >>> plan = plan_memory(H200, pair)
    >>> round(plan["a"].gpu_memory_utilization, 2)
    0.33
    """
    _check(needs, reserve)
    usable = hardware.memory_bytes * (1 - reserve)
    needed, lines = _sum(needs, in_turns)
    lines = (
        f"{hardware.name}: {_gib(hardware.memory_bytes)} less {reserve:.0%}"
        f" = {_gib(usable)} usable",
        *lines,
    )
    if not needed <= usable:
        raise DoesNotFit("\n".join((*lines, _advice(needs, needed, usable, in_turns))))
    parts = [
        Part(
            need=need,
            gpu_memory_utilization=(need.awake_bytes - CONTEXT_BYTES)
            / hardware.memory_bytes,
            sleeps=in_turns and len(needs) > 1,
        )
        for need in needs
    ]
    return MemoryPlan(parts=tuple(parts), free_bytes=usable - needed, arithmetic=lines)


def _check(needs: Sequence[Need], reserve: float) -> None:
    names = [need.name for need in needs]
    if len(set(names)) < len(names):
        raise InvalidSlice(f"two engines of one name among {names}")
    if not 0 <= reserve < 1:
        raise InvalidSlice(f"reserve is {reserve}, must be in [0, 1)")


def _sum(needs: Sequence[Need], in_turns: bool) -> tuple[float, tuple[str, ...]]:
    lines = [
        f"  {need.name}: weights {_gib(need.weights_bytes)}"
        f" + KV {need.kv_tokens} tokens x {need.kv_bytes_per_token:.0f} B"
        f" = {_gib(need.kv_bytes)}"
        f" + activations {_gib(need.activation_bytes)}"
        f" + context {_gib(CONTEXT_BYTES)} = {_gib(need.awake_bytes)}"
        for need in needs
    ]
    if not in_turns:
        needed = sum(need.awake_bytes for need in needs)
        return needed, (*lines, f"  all awake together: {_gib(needed)}")
    largest = max((need.awake_bytes for need in needs), default=0.0)
    asleep = CONTEXT_BYTES * max(len(needs) - 1, 0)
    needed = largest + asleep
    lines.append(
        f"  the largest awake {_gib(largest)} + {max(len(needs) - 1, 0)} contexts"
        f" asleep {_gib(asleep)} = {_gib(needed)}"
    )
    return needed, tuple(lines)


def _advice(needs: Sequence[Need], needed: float, usable: float, in_turns: bool) -> str:
    text = f"  {_gib(needed - usable)} too much"
    if not in_turns and _sum(needs, True)[0] <= usable:
        return f"{text}; they fit in turns (in_turns=True: sleep and wake)"
    spare = usable - (needed - sum(need.kv_bytes for need in needs))
    if not in_turns and spare > 0:
        part = spare / max(sum(need.kv_bytes for need in needs), 1.0)
        return f"{text}; they fit with {part:.0%} of the KV wanted"
    return text


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.2f} GiB"
