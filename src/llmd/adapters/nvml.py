"""Ask NVIDIA's driver what the devices are; `llmd.machines.detect` tells from it.

Needs nvidia-ml-py (`import pynvml`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import UnknownHardware
from ..machines.detect import Answers, Detected, detect

Answer = TypeVar("Answer")
_NVLINKS = 18
# `NVML_P2P_CAPS_INDEX_READ` is a tuple in the bindings, by a comma too many.
_READ, _WRITE = 0, 1
_NO_P2P = {
    1: "the chipset does not support peer-to-peer",
    2: "the GPU does not support peer-to-peer",
    3: "the topology does not allow peer-to-peer",
    4: "peer-to-peer is disabled by a registry key",
    5: "peer-to-peer is not supported",
}
"""`NVML_P2P_STATUS_...` of those that are not OK."""


def detect_all(nvml: Any = None) -> tuple[Detected, ...]:
    """Recognise every device of this machine, MIG instances one by one.

    Raises:
        UnknownHardware: There is no driver, or a device that no profile fits.
    """
    return tuple([detect(answers) for answers in read(nvml)])


def first(nvml: Any = None) -> Answers:
    """Return the answers of this machine's first device or MIG instance.

    Raises:
        UnknownHardware: There is no driver or no device.
    """
    found = read(nvml)
    if not found:
        raise UnknownHardware("NVML names no device")
    return found[0]


def read(nvml: Any = None) -> tuple[Answers, ...]:
    """Return the answers of every device, MIG instances one by one.

    Args:
        nvml: A module with the face of pynvml, which is imported if not given.

    Raises:
        UnknownHardware: There is no driver.
    """
    if nvml is None:
        import pynvml

        nvml = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise UnknownHardware(f"NVML does not start: {error}") from error
    try:
        answers: list[Answers] = []
        numbers = range(nvml.nvmlDeviceGetCount())
        devices = [nvml.nvmlDeviceGetHandleByIndex(number) for number in numbers]
        for number in numbers:
            answers += _device(nvml, devices, number)
        return tuple(answers)
    finally:
        nvml.nvmlShutdown()


def _device(nvml: Any, devices: list[Any], number: int) -> list[Answers]:
    device = devices[number]

    def ask(question: Callable[[], Answer]) -> Answer | None:
        # Old drivers and other products answer "not supported" to many.
        try:
            return question()
        except (nvml.NVMLError, AttributeError):
            return None

    mig = ask(lambda: nvml.nvmlDeviceGetMigMode(device)[0]) == 1
    whole = Answers(
        name=_text(nvml.nvmlDeviceGetName(device)),
        uuid=_text(nvml.nvmlDeviceGetUUID(device)),
        memory_bytes=nvml.nvmlDeviceGetMemoryInfo(device).total,
        compute_capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(device)),
        c2c=ask(lambda: bool(nvml.nvmlDeviceGetC2cModeInfoV(device).isC2cEnabled)),
        addressing_mode=ask(lambda: _mode(nvml.nvmlDeviceGetAddressingMode(device))),
        mig=mig,
        parent_uuid=_text(nvml.nvmlDeviceGetUUID(device)),
        nvlink_peers=_peers(nvml, device, ask),
        no_p2p=_no_p2p(nvml, device, devices[:number] + devices[number + 1 :], ask),
        pcie_generation=ask(lambda: nvml.nvmlDeviceGetMaxPcieLinkGeneration(device)),
        pcie_lanes=ask(lambda: nvml.nvmlDeviceGetMaxPcieLinkWidth(device)),
        gpus=len(devices),
    )
    return _instances(nvml, device, whole, ask) if mig else [whole]


def _instances(nvml: Any, device: Any, whole: Answers, ask: Any) -> list[Answers]:
    found = []
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(device)):
        instance = ask(
            lambda number=number: nvml.nvmlDeviceGetMigDeviceHandleByIndex(
                device, number
            )
        )
        if instance is not None:
            found.append(
                Answers(
                    name=whole.name,
                    uuid=_text(nvml.nvmlDeviceGetUUID(instance)),
                    memory_bytes=nvml.nvmlDeviceGetMemoryInfo(instance).total,
                    compute_capability=whole.compute_capability,
                    c2c=whole.c2c,
                    addressing_mode=whole.addressing_mode,
                    mig=True,
                    mig_instance=True,
                    parent_uuid=whole.uuid,
                    pcie_generation=whole.pcie_generation,
                    pcie_lanes=whole.pcie_lanes,
                    gpus=whole.gpus,
                )
            )
    return found


def _peers(nvml: Any, device: Any, ask: Any) -> tuple[str, ...]:
    peers = []
    for link in range(_NVLINKS):
        if ask(lambda link=link: nvml.nvmlDeviceGetNvLinkState(device, link)) == 1:
            remote = ask(
                lambda link=link: nvml.nvmlDeviceGetNvLinkRemotePciInfo(device, link)
            )
            if remote is not None:
                peers.append(_text(remote.busId))
    return tuple(dict.fromkeys(peers))


def _no_p2p(
    nvml: Any, device: Any, others: list[Any], ask: Any
) -> tuple[tuple[str, str], ...]:
    """Return which others it cannot read or write, each with why."""
    found = []
    for other in others:
        for what in (_READ, _WRITE):
            status = ask(
                lambda other=other, what=what: nvml.nvmlDeviceGetP2PStatus(
                    device, other, what
                )
            )
            if status in _NO_P2P:
                found.append((_text(nvml.nvmlDeviceGetUUID(other)), _NO_P2P[status]))
                break
    return tuple(found)


def _mode(answer: Any) -> int:
    return int(getattr(answer, "value", answer))


def _text(answer: Any) -> str:
    return answer.decode() if isinstance(answer, bytes) else str(answer)
