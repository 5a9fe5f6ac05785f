"""What it costs to hand one GPU from one engine to another."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from .hardware import Hardware
from .machine import Machine


@attrs.frozen(kw_only=True)
class Switching:
    """The fixed costs of a switch; links and sizes give the rest.

    Attributes:
        pause_s: To freeze one engine at a step boundary and let another go.
        release_s: To unmap the memory of an engine that goes to sleep.
        map_s: To map it again.
        host_mirror: Weights stay in host memory while the engine is awake, so
            going to sleep copies nothing.

    >>> from llmd.machines import GH200_96, H200
    >>> mirrored = Switching()
    >>> mirrored.switch_s(GH200_96, 16e9, 16e9) < mirrored.switch_s(H200, 16e9, 16e9)
    True
    """

    pause_s: float = 0.02
    release_s: float = 0.0
    map_s: float = 0.0
    host_mirror: bool = True

    def sleep_s(
        self, hardware: Hardware, weights_bytes: float, saved_kv_bytes: float = 0.0
    ) -> float:
        """Return the seconds until a paused engine's memory is free."""
        moved = saved_kv_bytes + (0.0 if self.host_mirror else weights_bytes)
        return self.release_s + (hardware.host.out_s(moved) if moved else 0.0)

    def wake_s(
        self, hardware: Hardware, weights_bytes: float, saved_kv_bytes: float = 0.0
    ) -> float:
        """Return the seconds until a sleeping engine may run a step."""
        return self.map_s + hardware.host.in_s(weights_bytes + saved_kv_bytes)

    def switch_s(self, hardware: Hardware, out_bytes: float, in_bytes: float) -> float:
        """Return the seconds from one engine's last step to the other's first.

        Args:
            hardware: What both run on.
            out_bytes: Weights that must leave; 0 if they may stay.
            in_bytes: Weights that must come; 0 if they are there.
        """
        seconds = self.pause_s
        if out_bytes:
            seconds += self.sleep_s(hardware, out_bytes)
        if in_bytes:
            seconds += self.wake_s(hardware, in_bytes)
        return seconds


MIRRORED = Switching()
"""Weights mirrored in host memory, as a switch should be; 20 ms to pause."""

COPIED = Switching(host_mirror=False)
"""The same with weights copied out each time, at the speed of the link."""

VLLM_SLEEP = Switching(release_s=0.092, map_s=0.442, host_mirror=False)
"""vLLM's sleep level 1 as measured on an H200 (vLLM 0.26, `H200SleepWake` of
`llmd.machines.measured`): what remains of 0.375 s and 0.725 s when 14.5 GiB at
55 GB/s are taken off.  The first sleep pins host memory and takes 18 s more."""


def recompute_s(machine: Machine, contexts: Iterable[int]) -> float:
    """Return the seconds to compute again what requests of *contexts* tokens held."""
    return sum(machine.prefill_s(float(tokens)) for tokens in contexts)


def saves_kv(machine: Machine, contexts: Iterable[int]) -> bool:
    """Say whether KV of running requests is better saved than computed again.

    >>> saves_kv(Machine(), [8000, 8000])
    True
    >>> saves_kv(Machine(), [])
    False
    """
    known = list(contexts)
    size_bytes = sum(known) * machine.kv_bytes_per_token
    host = machine.hardware.host
    return host.out_s(size_bytes) + host.in_s(size_bytes) < recompute_s(machine, known)
