"""Tell hardware from what a driver answers; `llmd.adapters.nvml` asks it."""

from __future__ import annotations

import attrs

from ..errors import UnknownHardware
from .hardware import (
    A100,
    A100_40,
    A100_PCIE,
    GH200_96,
    GH200_144,
    GH200_NVL2,
    H100,
    H100_NVL,
    H100_PCIE,
    H200,
    H200_NVL,
    L40S,
    NVLINK4,
    PCIE5,
    Hardware,
    Link,
)

ADDRESSING_ATS = 2
"""`NVML_DEVICE_ADDRESSING_MODE_ATS`: the GPU walks the CPU's page tables."""

_ORDER = (
    # All of these words in the product's name; the first that fits.
    (("H200", "NVL"), H200_NVL),
    (("H200",), H200),
    (("H100", "NVL"), H100_NVL),
    (("H100", "PCIE"), H100_PCIE),
    (("H100",), H100),
    (("A100", "40GB"), A100_40),
    (("A100", "PCIE"), A100_PCIE),
    (("A100",), A100),
    (("L40S",), L40S),
)
_TOLERANCE = 0.1
"""Of memory: what a driver says in GiB is 7 % over the GB of a data sheet."""
_BUS = {3: 0.25, 4: 0.5, 5: 1.0, 6: 2.0}


@attrs.frozen(kw_only=True)
class Answers:
    """What NVML says of one device; None where it does not know the question.

    Attributes:
        name: Product name.
        uuid: Of the device, or of the MIG instance.
        memory_bytes: In all; of the instance under MIG.
        compute_capability: Major and minor.
        c2c: Chip-to-chip link to the CPU enabled
            (`nvmlDeviceGetC2cModeInfoV`).
        addressing_mode: As `nvmlDeviceGetAddressingMode` counts.
        mig: MIG mode is on.
        mig_instance: This is an instance and not a whole GPU.
        parent_uuid: Of the whole GPU; `uuid` if this is one.
        nvlink_peers: UUIDs or bus ids of GPUs at the other end of an NVLink.
        no_p2p: UUIDs of GPUs of this machine whose memory it cannot read and write,
            each with why.
        pcie_generation: Of the link as it can run at most.
        pcie_lanes: Likewise.
        gpus: Of this kind in the machine.
    """

    name: str
    uuid: str = ""
    memory_bytes: int = 0
    compute_capability: tuple[int, int] = (0, 0)
    c2c: bool | None = None
    addressing_mode: int | None = None
    mig: bool | None = None
    mig_instance: bool = False
    parent_uuid: str = ""
    nvlink_peers: tuple[str, ...] = ()
    no_p2p: tuple[tuple[str, str], ...] = ()
    pcie_generation: int | None = None
    pcie_lanes: int | None = None
    gpus: int = 1


@attrs.frozen(kw_only=True)
class Detected:
    """A device, recognised.

    Attributes:
        hardware: Its profile, memory and host link as they are here.
        answers: What it was recognised by.
    """

    hardware: Hardware
    answers: Answers

    @property
    def mig(self) -> bool:
        """Whether it is a MIG instance: no CUDA IPC with any other."""
        return self.answers.mig_instance or bool(self.answers.mig)

    def why_no_ipc(self, other: Detected) -> str:
        """Say in words why CUDA IPC to *other* cannot work; empty if it can.

        The driver refuses to map memory from one MIG instance into a process
        of another, even on the same GPU, and of a GPU that the bus does not
        let another reach.
        """
        for device in (self, other):
            if device.mig and self.answers.uuid != other.answers.uuid:
                return (
                    f"{device.answers.uuid or device.answers.name} is a MIG instance:"
                    " CUDA IPC is blocked between instances, go through host memory"
                )
        for one, to in ((self.answers, other.answers), (other.answers, self.answers)):
            for uuid, why in one.no_p2p:
                if uuid == to.uuid:
                    return (
                        f"{one.uuid} does not reach the memory of {uuid}, as {why}: go"
                        " through host memory"
                    )
        return ""


def detect(answers: Answers) -> Detected:
    """Recognise a device.

    A GH200 is told by what it can do and not by its name alone: Hopper (compute
    capability 9.0) on a chip-to-chip link.  A GB10 has such a link too.  Cards
    of one name differ by memory and form: those that no profile describes are
    refused, and not given the rates of others.

    Raises:
        UnknownHardware: No profile fits, or not by a tenth of the memory, or a
            MIG instance does not say its memory; the message repeats the
            answers.

    >>> found = detect(Answers(
    ...     name="NVIDIA GH200 480GB", memory_bytes=102_005_473_280,
    ...     compute_capability=(9, 0), c2c=True, addressing_mode=2,
    ... ))
    >>> found.hardware.name, found.hardware.coherent
    ('gh200-96gb', True)
    """
    hardware = _profile(answers)
    whole_bytes = hardware.memory_bytes
    if answers.memory_bytes:
        hardware = attrs.evolve(hardware, memory_bytes=float(answers.memory_bytes))
    if hardware.coherent:
        ats = answers.addressing_mode in (None, ADDRESSING_ATS)
        hardware = attrs.evolve(hardware, coherent=ats)
    else:
        hardware = attrs.evolve(hardware, host=_bus(hardware.host, answers))
    if not answers.nvlink_peers:
        hardware = attrs.evolve(hardware, peer=None)
    if answers.mig_instance:
        hardware = _part(hardware, answers.memory_bytes / whole_bytes)
    return Detected(hardware=hardware, answers=answers)


def _profile(answers: Answers) -> Hardware:
    hardware = _by_name(answers)
    if hardware is None:
        raise UnknownHardware(f"no profile fits {answers}")
    found, expected = answers.memory_bytes, hardware.memory_bytes
    if answers.mig_instance:
        # Which part of the GPU it is, only its memory tells.
        if not 0 < found <= expected * (1 + _TOLERANCE):
            raise UnknownHardware(
                f"a MIG instance of {found} bytes is no part of {hardware.name}"
                f" with its {expected:.0f}: {answers}"
            )
    elif found and abs(found / expected - 1) > _TOLERANCE:
        raise UnknownHardware(
            f"{hardware.name} has {expected:.0f} bytes, and other rates than one"
            f" of {found}; give its profile by attrs.evolve: {answers}"
        )
    return hardware


def _by_name(answers: Answers) -> Hardware | None:
    name, hopper = answers.name.upper(), answers.compute_capability == (9, 0)
    if hopper and (answers.c2c or "GH200" in name):
        return _superchip(answers)
    for words, hardware in _ORDER:
        if all(word in name for word in words) and (
            answers.compute_capability == hardware.compute_capability
        ):
            return hardware
    return None


def _superchip(answers: Answers) -> Hardware:
    """Tell a GH200 by its memory, and its peers by how many share its NVLink."""
    # Instances of a MIG split do not tell 96 from 144 GB; the name does.
    large = answers.memory_bytes > 120e9 or "144G" in answers.name
    hardware = GH200_144 if large else GH200_96
    peers = len(answers.nvlink_peers)
    if large and peers == 1:
        return GH200_NVL2
    # Joined directly they share its 18 links; by a switch each may use all.
    direct = peers == answers.gpus - 1
    return attrs.evolve(hardware, peer=_divided(NVLINK4, peers if direct else 1))


def _divided(link: Link, ways: int) -> Link:
    """Return what one of so many peers gets of a link."""
    if ways <= 1:
        return link
    return attrs.evolve(
        link,
        name=f"{link.name} / {ways}",
        in_bytes_per_s=link.in_bytes_per_s / ways,
        out_bytes_per_s=link.out_bytes_per_s / ways,
    )


def _part(hardware: Hardware, share: float) -> Hardware:
    """Return the part of a GPU that a MIG instance with *share* of its memory is."""
    return attrs.evolve(
        hardware,
        memory_bytes_per_s=hardware.memory_bytes_per_s * share,
        bf16_flops_per_s=hardware.bf16_flops_per_s * share,
        fp8_flops_per_s=hardware.fp8_flops_per_s * share,
    )


def _bus(host: Link, answers: Answers) -> Link:
    """Scale the host link by the bus that is really there."""
    generation, lanes = answers.pcie_generation, answers.pcie_lanes
    if generation not in _BUS or not lanes:
        return host
    full = 5 if host is PCIE5 else 4
    part = min(1.0, _BUS[generation] / _BUS[full] * lanes / 16)
    return attrs.evolve(
        host,
        name=f"PCIe {min(generation, full)} x{lanes}",
        in_bytes_per_s=host.in_bytes_per_s * part,
        out_bytes_per_s=host.out_bytes_per_s * part,
    )
