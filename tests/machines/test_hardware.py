"""Profiles, detection, links and what follows from them."""

import itertools

import attrs
import numpy as np
import pytest

from llmd.errors import InvalidHardware, UnknownHardware
from llmd.machines import (
    GH200_96,
    H200,
    PROFILES,
    VLLM_SLEEP,
    Answers,
    Link,
    Machine,
    break_even_tokens,
    calibrate_host,
    detect,
    fetch_gain_s,
    saves_kv,
    this_cpu,
    tier_credit,
)
from llmd.machines.measured import H200SleepWake
from llmd.machines.shape import QWEN25_7B, Shape
from llmd.types import Tier

H200_ANSWERS = Answers(
    name="NVIDIA H200",
    memory_bytes=150_754_820_096,
    compute_capability=(9, 0),
    c2c=False,
    pcie_generation=5,
    pcie_lanes=16,
)


@pytest.mark.parametrize(
    ("answers", "name"),
    [
        (H200_ANSWERS, "h200"),
        (
            Answers(
                name="NVIDIA GH200 480GB",
                memory_bytes=97_280 << 20,
                compute_capability=(9, 0),
                c2c=True,
                addressing_mode=2,
            ),
            "gh200-96gb",
        ),
        (
            Answers(
                name="NVIDIA GH200 144G HBM3e",
                memory_bytes=146_831 << 20,
                compute_capability=(9, 0),
                c2c=True,
            ),
            "gh200-144gb",
        ),
        (
            Answers(
                name="NVIDIA GH200 144G HBM3e",
                memory_bytes=146_831 << 20,
                compute_capability=(9, 0),
                c2c=True,
                nvlink_peers=("0009:01:00.0",),
                gpus=2,
            ),
            "gh200-nvl2",
        ),
        (Answers(name="NVIDIA H100 80GB HBM3", compute_capability=(9, 0)), "h100"),
        (Answers(name="NVIDIA A100-SXM4-80GB", compute_capability=(8, 0)), "a100"),
        (Answers(name="NVIDIA L40S", compute_capability=(8, 9)), "l40s"),
        (Answers(name="NVIDIA H200 NVL", compute_capability=(9, 0)), "h200-nvl"),
        (Answers(name="NVIDIA H100 NVL", compute_capability=(9, 0)), "h100-nvl"),
        (Answers(name="NVIDIA H100 PCIe", compute_capability=(9, 0)), "h100-pcie"),
        (Answers(name="NVIDIA A100 80GB PCIe", compute_capability=(8, 0)), "a100-pcie"),
        (Answers(name="NVIDIA A100-SXM4-40GB", compute_capability=(8, 0)), "a100-40gb"),
        (Answers(name="NVIDIA A100-PCIE-40GB", compute_capability=(8, 0)), "a100-40gb"),
    ],
)
def test_devices_are_recognised(answers, name):
    assert detect(answers).hardware.name == name


@pytest.mark.parametrize(
    "answers",
    [
        # A chip-to-chip link alone does not make a GH200.
        Answers(name="NVIDIA GB10", compute_capability=(12, 1), c2c=True),
        Answers(name="Tesla T4", compute_capability=(7, 5)),
        # Its memory is larger than that of the profile of its name, and faster.
        Answers(
            name="NVIDIA H100 96GB HBM3",
            memory_bytes=97_871 << 20,
            compute_capability=(9, 0),
        ),
    ],
)
def test_unknown_devices_are_refused_with_their_answers(answers):
    with pytest.raises(UnknownHardware, match=answers.name):
        detect(answers)


def test_a_gh200_without_ats_is_not_coherent():
    answers = Answers(
        name="NVIDIA GH200 480GB",
        compute_capability=(9, 0),
        c2c=True,
        addressing_mode=0,
    )
    assert not detect(answers).hardware.coherent


def superchip(memory_mib, peers, gpus):
    return Answers(
        name="NVIDIA GH200",
        memory_bytes=memory_mib << 20,
        compute_capability=(9, 0),
        c2c=True,
        nvlink_peers=tuple(f"000{peer}:01:00.0" for peer in range(peers)),
        gpus=gpus,
    )


@pytest.mark.parametrize(
    ("answers", "name", "memory_rate", "peer_rate"),
    [
        (superchip(97_280, 3, 4), "gh200-96gb", 4.0e12, 150e9),
        (superchip(146_831, 3, 4), "gh200-144gb", 4.9e12, 150e9),
        (superchip(97_280, 1, 2), "gh200-96gb", 4.0e12, 450e9),
        (superchip(146_831, 1, 2), "gh200-nvl2", 4.9e12, 450e9),
        (superchip(97_280, 9, 1), "gh200-96gb", 4.0e12, 450e9),
    ],
)
def test_peers_of_a_gh200_change_no_memory(answers, name, memory_rate, peer_rate):
    hardware = detect(answers).hardware
    assert hardware.name == name
    assert hardware.memory_bytes_per_s == memory_rate
    assert hardware.peer.in_bytes_per_s == peer_rate


def test_gpus_beside_each_other_are_no_peers_without_nvlink():
    assert detect(attrs.evolve(H200_ANSWERS, gpus=8)).hardware.peer is None
    assert detect(superchip(97_280, 0, 2)).hardware.peer is None
    joined = attrs.evolve(H200_ANSWERS, gpus=8, nvlink_peers=("0000:07:00.0",))
    assert detect(joined).hardware.peer == H200.peer


@pytest.mark.parametrize("memory_bytes", [0, 200 << 30])
def test_a_mig_instance_must_say_which_part_it_is(memory_bytes):
    answers = attrs.evolve(H200_ANSWERS, mig_instance=True, memory_bytes=memory_bytes)
    with pytest.raises(UnknownHardware, match="MIG instance of"):
        detect(answers)


def test_a_narrow_bus_is_a_slow_link():
    narrow = detect(attrs.evolve(H200_ANSWERS, pcie_generation=4, pcie_lanes=8))
    full = detect(H200_ANSWERS).hardware.host
    assert full.in_bytes_per_s == H200.host.in_bytes_per_s
    assert narrow.hardware.host.in_bytes_per_s == full.in_bytes_per_s / 4


def test_mig_instances_cannot_share_by_ipc():
    half = attrs.evolve(
        H200_ANSWERS,
        uuid="MIG-1",
        parent_uuid="GPU-1",
        mig=True,
        mig_instance=True,
        memory_bytes=int(70.5e9),
    )
    one, two = detect(half), detect(attrs.evolve(half, uuid="MIG-2"))
    assert "host memory" in one.why_no_ipc(two)
    assert one.why_no_ipc(one) == ""
    assert one.hardware.bf16_flops_per_s == pytest.approx(
        H200.bf16_flops_per_s / 2, rel=0.01
    )
    whole = detect(H200_ANSWERS)
    assert whole.why_no_ipc(whole) == ""


def test_a_machine_is_detected_with_its_link():
    machine = Machine.detect(H200_ANSWERS)
    assert machine.hardware.memory_bytes == H200_ANSWERS.memory_bytes
    assert machine.name == "h200/qwen2.5-7b"


def test_the_roofline_is_near_what_was_measured():
    predicted, measured = Machine.of(H200, QWEN25_7B), Machine()
    for tokens in (2048.0, 8192.0, 32000.0):
        assert predicted.prefill_s(tokens) == pytest.approx(
            measured.prefill_s(tokens), rel=0.15
        )
    assert predicted.decode_s(1, 576) == pytest.approx(measured.decode_s(1, 576), 0.15)


@pytest.mark.parametrize("hardware", PROFILES.values(), ids=lambda one: one.name)
def test_faster_memories_are_worth_more(hardware):
    machine = Machine.of(hardware, QWEN25_7B)
    worth = [tier_credit(machine, tier) for tier in Tier]
    assert worth[0] == 1.0
    assert worth[1] >= worth[2] >= 0.0
    assert worth[1] > 0.5
    assert all(0 <= one <= 1 for one in worth)


def test_the_link_decides_whether_to_fetch():
    machine = Machine()
    # The same 32,000 tokens, over CUDA IPC and over a path that fell to TCP.
    assert fetch_gain_s(machine, 32_000, 200e9) > 1.0
    assert fetch_gain_s(machine, 32_000, 0.09e9) < -15
    tokens = break_even_tokens(machine, 200e9, remote_queue_s=0.1)
    before = fetch_gain_s(machine, tokens - 1, 200e9, remote_queue_s=0.1)
    after = fetch_gain_s(machine, tokens, 200e9, remote_queue_s=0.1)
    assert before <= 0 < after


def test_the_measured_sleep_and_wake():
    seen = H200SleepWake()
    slept = VLLM_SLEEP.sleep_s(H200, seen.weights_bytes)
    woke = VLLM_SLEEP.wake_s(H200, seen.weights_bytes)
    assert slept == pytest.approx(seen.sleep_s, rel=0.01)
    assert woke == pytest.approx(seen.wake_s, rel=0.01)


def test_kv_is_saved_where_the_link_is_faster_than_the_gpu():
    thin = Link(name="slow", in_bytes_per_s=1e9, out_bytes_per_s=1e9)
    slow = attrs.evolve(Machine(), hardware=attrs.evolve(H200, host=thin))
    assert saves_kv(Machine(), [4000] * 8)
    assert not saves_kv(slow, [4000] * 8)


def test_calibration_takes_the_best_and_leaves_out_the_first():
    spent = itertools.chain([9.0], itertools.repeat(0.0))
    jitter = itertools.cycle([1.0, 1.3, 1.1, 1.6])

    def copy_in(size):
        return next(spent) + (20e-6 + size / 400e9) * next(jitter)

    def copy_out(size):
        return (20e-6 + size / 300e9) * next(jitter)

    found = calibrate_host(GH200_96, copy_in, copy_out).host
    assert found.in_bytes_per_s == pytest.approx(400e9, rel=0.01)
    assert found.out_bytes_per_s == pytest.approx(300e9, rel=0.01)
    assert found.latency_s == pytest.approx(20e-6, rel=0.05)


def test_a_copy_that_was_not_waited_for_is_noticed():
    with pytest.raises(InvalidHardware, match="waited"):
        calibrate_host(H200, lambda size: 1e-5, lambda size: 1e-5)


def test_this_cpu_can_be_calibrated_by_real_copies():
    import time

    source = np.ones(1 << 28, dtype=np.uint8)
    target = np.empty_like(source)

    def copy(size):
        start = time.perf_counter()
        np.copyto(target[:size], source[:size])
        return time.perf_counter() - start

    cpu = calibrate_host(this_cpu(8e9, 1, 1e9), copy, copy, repeats=2)
    assert cpu.host.in_bytes_per_s > 1e8
    assert Machine.of(cpu, QWEN25_7B).prefill_s(100.0) > Machine().prefill_s(100.0)


def test_a_rate_must_be_positive():
    with pytest.raises(InvalidHardware):
        Link(name="none", in_bytes_per_s=0.0, out_bytes_per_s=1.0)


def test_a_shape_is_read_from_a_config():
    config = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    }
    assert Shape.from_config(config, QWEN25_7B.name) == QWEN25_7B
    with pytest.raises(InvalidHardware, match="vocab_size"):
        Shape.from_config({k: v for k, v in config.items() if k != "vocab_size"})
