"""The NVML reader on a driver that answers from a record, and on none."""

import sys
from types import SimpleNamespace

import pytest

from llmd.adapters import nvml
from llmd.errors import UnknownHardware
from llmd.machines import Machine


class RecordedDriver:
    """Answers as the bindings do for one GH200: some questions raise."""

    class NVMLError(Exception):
        pass

    def __init__(self, mig_instances=0):
        self.mig_instances = mig_instances
        self.closed = False

    def nvmlInit(self):  # noqa: N802
        pass

    def nvmlShutdown(self):  # noqa: N802
        self.closed = True

    def __getattr__(self, name):
        answers = {
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": "gpu",
            "nvmlDeviceGetName": b"NVIDIA GH200 480GB",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=97_280 << 20),
            "nvmlDeviceGetCudaComputeCapability": [9, 0],
            "nvmlDeviceGetC2cModeInfoV": SimpleNamespace(isC2cEnabled=1),
            "nvmlDeviceGetAddressingMode": 2,
            "nvmlDeviceGetMigMode": [int(self.mig_instances > 0)] * 2,
            "nvmlDeviceGetMaxMigDeviceCount": 7,
        }
        if name == "nvmlDeviceGetUUID":
            return lambda device: f"UUID-{device}"
        if name == "nvmlDeviceGetMigDeviceHandleByIndex":
            return self._instance
        if name in answers:
            return lambda *_: answers[name]
        return self._unsupported

    def _instance(self, device, number):
        if number >= self.mig_instances:
            raise self.NVMLError("not found")
        return f"mig-{number}"

    def _unsupported(self, *_):
        raise self.NVMLError("not supported")


def test_a_gh200_is_read_and_recognised():
    driver = RecordedDriver()
    [found] = nvml.detect_all(driver)
    assert found.hardware.name == "gh200-96gb"
    assert found.hardware.coherent
    assert not found.mig
    assert found.answers.pcie_generation is None
    assert driver.closed


def test_a_machine_detects_itself(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", RecordedDriver())
    assert Machine.detect().hardware.name == "gh200-96gb"
    monkeypatch.setattr(RecordedDriver, "nvmlDeviceGetCount", lambda _: 0, False)
    with pytest.raises(UnknownHardware, match="no device"):
        Machine.detect()


def test_every_mig_instance_is_read():
    one, two = nvml.detect_all(RecordedDriver(mig_instances=2))
    assert (one.answers.uuid, two.answers.uuid) == ("UUID-mig-0", "UUID-mig-1")
    assert one.answers.parent_uuid == "UUID-gpu"
    assert one.why_no_ipc(two)


def test_no_driver_is_an_error_of_ours():
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        with pytest.raises(UnknownHardware, match="NVML"):
            nvml.read()
    else:
        pynvml.nvmlShutdown()
        pytest.skip("this machine has a driver")
