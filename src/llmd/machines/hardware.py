"""What hardware can do: memory, compute and links, each figure with its source.

Rates of links are measured ones where a measurement is known, and otherwise the
published figure of one direction.  `llmd.machines.calibrate` replaces them by
what the machine at hand does.
"""

from __future__ import annotations

import attrs

from ..errors import InvalidHardware

GB = 1e9
GIB = float(1 << 30)


def _positive(_: object, field: attrs.Attribute[float], value: float) -> None:
    if not value > 0:
        raise InvalidHardware(f"{field.name} is {value}, must be above 0")


@attrs.frozen(kw_only=True)
class Link:
    """A way between the memory of a GPU and another memory.

    The two directions are two links: on GH200 they differ by a third.

    Attributes:
        name: Of the technology.
        in_bytes_per_s: Towards the GPU.
        out_bytes_per_s: Away from it.
        latency_s: Before the first byte.

    >>> Link(name="pcie5", in_bytes_per_s=55e9, out_bytes_per_s=55e9).in_s(55e9)
    1.00001
    """

    name: str
    in_bytes_per_s: float = attrs.field(validator=_positive)
    out_bytes_per_s: float = attrs.field(validator=_positive)
    latency_s: float = 10e-6

    def in_s(self, size_bytes: float) -> float:
        """Return the seconds to bring *size_bytes* to the GPU."""
        return self.latency_s + size_bytes / self.in_bytes_per_s

    def out_s(self, size_bytes: float) -> float:
        """Return the seconds to take *size_bytes* from the GPU."""
        return self.latency_s + size_bytes / self.out_bytes_per_s


@attrs.frozen(kw_only=True)
class Hardware:
    """One GPU and what it hangs on.

    Attributes:
        name: Of the profile.
        memory_bytes: Of the GPU, usable.
        memory_bytes_per_s: Of the GPU, published peak.
        bf16_flops_per_s: Dense, published peak.
        fp8_flops_per_s: Dense, published peak; 0 if it has none.
        host_bytes: Memory of the CPU side that one GPU can count on.
        host: Link to that memory.
        peer: Link to another GPU of the node; None if there is none.
        disk_bytes_per_s: Of reading local NVMe.  A PCIe 4 drive reads 5-7 GB/s
            by its data sheet; nobody measured it here.
        network_bytes_per_s: Of another node's memory: one 400 Gbit/s port.
        compute_capability: Of the GPU as CUDA counts; (0, 0) for a CPU.
        coherent: CPU and GPU share page tables (ATS over NVLink-C2C).

    >>> GH200_96.host.in_bytes_per_s > 6 * H200.host.in_bytes_per_s
    True
    """

    name: str
    memory_bytes: float = attrs.field(validator=_positive)
    memory_bytes_per_s: float = attrs.field(validator=_positive)
    bf16_flops_per_s: float = attrs.field(validator=_positive)
    fp8_flops_per_s: float = 0.0
    host_bytes: float = attrs.field(validator=_positive)
    host: Link
    peer: Link | None = None
    disk_bytes_per_s: float = 5 * GB
    network_bytes_per_s: float = 50 * GB
    compute_capability: tuple[int, int] = (0, 0)
    coherent: bool = False


PCIE5 = Link(name="PCIe 5 x16", in_bytes_per_s=55 * GB, out_bytes_per_s=55 * GB)
"""Pinned copies on an H200, 24 November 2026; the bus itself carries 63 GB/s."""

PCIE4 = Link(name="PCIe 4 x16", in_bytes_per_s=27.5 * GB, out_bytes_per_s=27.5 * GB)
"""The bus carries 31.5 GB/s, times the part of it that a PCIe 5 bus gave."""

C2C = Link(name="NVLink-C2C", in_bytes_per_s=395 * GB, out_bytes_per_s=296 * GB)
"""450 GB/s a direction by the data sheet.  Published measurements: 375-416 GB/s
towards the GPU and 295-298 away from it, of which these are the middles."""

NVLINK4 = Link(name="NVLink 4", in_bytes_per_s=450 * GB, out_bytes_per_s=450 * GB)
"""900 GB/s in both directions together by NVIDIA's H100 and H200 data sheets."""

NVLINK3 = Link(name="NVLink 3", in_bytes_per_s=300 * GB, out_bytes_per_s=300 * GB)
"""600 GB/s in both directions together by NVIDIA's A100 data sheet."""

NVLINK_BRIDGE = attrs.evolve(NVLINK3, name="NVLink bridge")
"""600 GB/s in both directions together between PCIe cards joined by bridges, by
NVIDIA's data sheets of A100, H100 PCIe and H100 NVL."""

GH200_96 = Hardware(
    name="gh200-96gb",
    memory_bytes=97_280 * (1 << 20),
    memory_bytes_per_s=4.0e12,
    bf16_flops_per_s=989e12,
    fp8_flops_per_s=1979e12,
    host_bytes=480 * GB,
    host=C2C,
    compute_capability=(9, 0),
    coherent=True,
)
"""NVIDIA GH200 data sheet: 96 GB HBM3 at 4.0 TB/s (97,280 MiB usable; measured
3.4-3.7 TB/s), 480 GB LPDDR5X at up to 512 GB/s (measured 348-486)."""

GH200_144 = attrs.evolve(
    GH200_96,
    name="gh200-144gb",
    memory_bytes=144 * GB,
    memory_bytes_per_s=4.9e12,
)
"""NVIDIA GH200 data sheet: 144 GB HBM3e at 4.9 TB/s, the rest as with 96 GB."""

GH200_NVL2 = attrs.evolve(GH200_144, name="gh200-nvl2", peer=NVLINK4)
"""One half of a GH200 NVL2: two superchips of 144 GB, 900 GB/s of NVLink between."""

H200 = Hardware(
    name="h200",
    memory_bytes=141 * GB,
    memory_bytes_per_s=4.8e12,
    bf16_flops_per_s=989e12,
    fp8_flops_per_s=1979e12,
    host_bytes=256 * GB,
    host=PCIE5,
    peer=NVLINK4,
    compute_capability=(9, 0),
)
"""NVIDIA H200 SXM data sheet: 141 GB HBM3e at 4.8 TB/s.  Host memory is
assumed: a node of eight with 2 TB."""

H100 = attrs.evolve(H200, name="h100", memory_bytes=80 * GB, memory_bytes_per_s=3.35e12)
"""NVIDIA H100 SXM data sheet: 80 GB HBM3 at 3.35 TB/s, compute as the H200."""

H100_PCIE = attrs.evolve(
    H100,
    name="h100-pcie",
    memory_bytes_per_s=2.0e12,
    bf16_flops_per_s=756e12,
    fp8_flops_per_s=1513e12,
    peer=NVLINK_BRIDGE,
)
"""NVIDIA H100 PCIe data sheet: 80 GB HBM2e at 2.0 TB/s; compute is half of the
figures with sparsity."""

H100_NVL = attrs.evolve(
    H100,
    name="h100-nvl",
    memory_bytes=94 * GB,
    memory_bytes_per_s=3.9e12,
    bf16_flops_per_s=835.5e12,
    fp8_flops_per_s=1670.5e12,
    peer=NVLINK_BRIDGE,
)
"""NVIDIA H100 NVL data sheet, of one card: 94 GB HBM3 at 3.9 TB/s; compute is
half of the figures with sparsity."""

H200_NVL = attrs.evolve(
    H200,
    name="h200-nvl",
    bf16_flops_per_s=835.5e12,
    fp8_flops_per_s=1670.5e12,
)
"""NVIDIA H200 NVL data sheet: memory and NVLink (by bridges, 900 GB/s) as the
SXM module, compute as the H100 NVL."""

A100 = Hardware(
    name="a100",
    memory_bytes=80 * GB,
    memory_bytes_per_s=2.039e12,
    bf16_flops_per_s=312e12,
    host_bytes=128 * GB,
    host=PCIE4,
    peer=NVLINK3,
    compute_capability=(8, 0),
)
"""NVIDIA A100 80GB SXM data sheet; no FP8.  Host memory
is assumed: a node of eight with 1 TB."""

A100_PCIE = attrs.evolve(
    A100, name="a100-pcie", memory_bytes_per_s=1.935e12, peer=NVLINK_BRIDGE
)
"""NVIDIA A100 80GB PCIe data sheet: 80 GB HBM2e at 1,935 GB/s."""

A100_40 = attrs.evolve(
    A100, name="a100-40gb", memory_bytes=40 * GB, memory_bytes_per_s=1.555e12
)
"""NVIDIA A100 40GB data sheet, SXM and PCIe alike: 40 GB HBM2 at 1,555 GB/s."""

L40S = Hardware(
    name="l40s",
    memory_bytes=48 * GB,
    memory_bytes_per_s=0.864e12,
    bf16_flops_per_s=362e12,
    fp8_flops_per_s=733e12,
    host_bytes=128 * GB,
    host=PCIE4,
    compute_capability=(8, 9),
)
"""NVIDIA L40S data sheet, figures without sparsity; no NVLink."""

PROFILES: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        *(GH200_96, GH200_144, GH200_NVL2, H200, H200_NVL, H100, H100_NVL, H100_PCIE),
        *(A100, A100_PCIE, A100_40, L40S),
    )
}
"""Every profile by its name."""


def this_cpu(memory_bytes: float, cores: int, copy_bytes_per_s: float) -> Hardware:
    """Describe the machine this runs on as if its CPU were the GPU.

    Args:
        memory_bytes: Of the machine.
        cores: That an engine may use.
        copy_bytes_per_s: What a large copy in memory was measured to do.

    Source of the compute: 2.5 GHz x 32 floating-point operations a cycle and
    core (two 256-bit fused multiply-adds in float32), a floor for x86 servers
    since 2015.  Fit a `Machine` to a probe where it matters.
    """
    memory = Link(
        name="memory",
        in_bytes_per_s=copy_bytes_per_s,
        out_bytes_per_s=copy_bytes_per_s,
        latency_s=0.0,
    )
    return Hardware(
        name="cpu",
        memory_bytes=memory_bytes,
        memory_bytes_per_s=copy_bytes_per_s * 2,
        bf16_flops_per_s=cores * 2.5e9 * 32,
        host_bytes=memory_bytes,
        host=memory,
        coherent=True,
    )
