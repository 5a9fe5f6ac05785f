"""Measure each direction of a link when a machine starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import attrs

from ..errors import InvalidHardware
from .hardware import Hardware, Link

Copy: TypeAlias = Callable[[int], float]
"""Copies this many bytes and returns the seconds it took."""

_SMALL_BYTES = 1 << 16
_LARGE_BYTES = 1 << 28


def calibrate_link(link: Link, copy_in: Copy, copy_out: Copy, repeats: int = 5) -> Link:
    """Return *link* with measured rates and latency.

    The best of *repeats* copies counts, after one that warms the way up: the
    first maps memory and takes many times longer.  Two sizes separate latency
    from rate.  Copies 5 x 256 MiB each way: about 0.1 s over PCIe 5.

    Raises:
        InvalidHardware: A large copy took no longer than a small one.

    >>> slow = lambda size: 1e-5 + size / 40e9
    >>> fast = lambda size: 1e-5 + size / 50e9
    >>> guess = Link(name="pcie", in_bytes_per_s=1.0, out_bytes_per_s=1.0)
    >>> found = calibrate_link(guess, fast, slow)
    >>> round(found.in_bytes_per_s / 1e9), round(found.out_bytes_per_s / 1e9)
    (50, 40)
    """
    in_rate, in_latency = _rate(copy_in, repeats)
    out_rate, out_latency = _rate(copy_out, repeats)
    return attrs.evolve(
        link,
        in_bytes_per_s=in_rate,
        out_bytes_per_s=out_rate,
        latency_s=(in_latency + out_latency) / 2,
    )


def calibrate_host(
    hardware: Hardware, copy_in: Copy, copy_out: Copy, repeats: int = 5
) -> Hardware:
    """Return *hardware* with its link to host memory measured."""
    host = calibrate_link(hardware.host, copy_in, copy_out, repeats)
    return attrs.evolve(hardware, host=host)


def _rate(copy: Copy, repeats: int) -> tuple[float, float]:
    copy(_LARGE_BYTES)
    small = min(copy(_SMALL_BYTES) for _ in range(repeats))
    large = min(copy(_LARGE_BYTES) for _ in range(repeats))
    if not large > small > 0:
        raise InvalidHardware(
            f"copies of {_SMALL_BYTES} and {_LARGE_BYTES} bytes took {small} and"
            f" {large} s: was the copy waited for?"
        )
    rate = (_LARGE_BYTES - _SMALL_BYTES) / (large - small)
    return rate, max(0.0, small - _SMALL_BYTES / rate)
