"""The NVML reader on a driver that answers from a record, and on none."""

import sys
from types import SimpleNamespace

import pytest

from llmd.adapters import nvml
from llmd.errors import UnknownHardware
from llmd.machines import Machine
from llmd.transport import Place, Way, choose_way


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


class TwoCards(RecordedDriver):
    """Two L40S, which have no NVLink; *statuses* by (from, to, 0 read or 1 write)."""

    def __init__(self, statuses):
        super().__init__()
        self.statuses = statuses

    def __getattr__(self, name):
        answers = {
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda number: number,
            "nvmlDeviceGetName": lambda device: "NVIDIA L40S",
            "nvmlDeviceGetMemoryInfo": lambda device: SimpleNamespace(
                total=46_068 << 20
            ),
            "nvmlDeviceGetCudaComputeCapability": lambda device: (8, 9),
            "nvmlDeviceGetUUID": lambda device: f"GPU-{device}",
            "nvmlDeviceGetP2PStatus": lambda *what: self.statuses[what],
        }
        return answers.get(name, self._unsupported)


EVERY_WAY = [(a, b, what) for a, b in ((0, 1), (1, 0)) for what in (0, 1)]


def test_cards_that_reach_each_other_can_map_each_other():
    one, two = nvml.detect_all(TwoCards(dict.fromkeys(EVERY_WAY, 0)))
    assert one.why_no_ipc(two) == two.why_no_ipc(one) == ""


@pytest.mark.parametrize("broken", EVERY_WAY)
def test_cards_that_do_not_go_through_host_memory(broken):
    driver = TwoCards(dict.fromkeys(EVERY_WAY, 0) | {broken: 1})
    one, two = nvml.detect_all(driver)
    assert len(one.answers.no_p2p) + len(two.answers.no_p2p) == 1
    for source, target in ((one, two), (two, one)):
        choice = choose_way(
            Place(host="a", device=source), Place(host="a", device=target)
        )
        assert choice.way is Way.HOST
        [why] = choice.reasons
        assert "the chipset does not support peer-to-peer" in why
        assert "GPU-0" in why
        assert "GPU-1" in why
    assert one.why_no_ipc(one) == ""


def test_a_driver_that_cannot_say_is_believed_to():
    driver = TwoCards(dict.fromkeys(EVERY_WAY, 6))  # unknown
    one, two = nvml.detect_all(driver)
    assert one.why_no_ipc(two) == ""
    driver.statuses = {}
    driver.nvmlDeviceGetP2PStatus = driver._unsupported
    assert nvml.read(driver)[0].no_p2p == ()


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
