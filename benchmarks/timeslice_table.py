"""Three 16 GB models, one GPU: what switching costs over C2C and over PCIe 5.

    python benchmarks/timeslice_table.py

From the machine profiles, and again by running the policy on the modelled GPU.
"""

from __future__ import annotations

import attrs

from llmd.machines import COPIED, GH200_96, H200, MIRRORED, Hardware, Machine, Switching
from llmd.machines.shape import QWEN25_7B
from llmd.sim.gpu import GpuReport, GpuWorker, Job, SimGpu
from llmd.timeslice import (
    GpuArbiter,
    QuantumScheduler,
    Sharer,
    quantum_cap,
    quantum_for_overhead,
)

WEIGHTS_BYTES = 16e9
ENGINES = ("a", "b", "c")
WASTES = (0.05, 0.1, 0.2)
CASES = (
    ("pause, all resident", GH200_96, MIRRORED, True),
    ("C2C, host mirror kept", GH200_96, MIRRORED, False),
    ("PCIe 5, host mirror kept", H200, MIRRORED, False),
    ("PCIe 5, copied both ways", H200, COPIED, False),
)


def switch_s(hardware: Hardware, switching: Switching, resident: bool) -> float:
    size_bytes = 0.0 if resident else WEIGHTS_BYTES
    return switching.switch_s(hardware, size_bytes, size_bytes)


def simulate(
    hardware: Hardware,
    switching: Switching,
    resident: bool,
    policy: QuantumScheduler,
    rounds: int = 10,
) -> GpuReport:
    """Run three busy engines; all fit, or one at a time does."""
    machine = attrs.evolve(Machine.of(hardware, QWEN25_7B), weights_bytes=WEIGHTS_BYTES)
    jobs = [Job(arrived_at=0.0, prompt_tokens=512, new_tokens=10**9)] * 16
    workers = [
        GpuWorker(Sharer.on(name, machine, switching), machine=machine, jobs=jobs)
        for name in ENGINES
    ]
    arbiter = GpuArbiter(
        policy,
        memory_bytes=WEIGHTS_BYTES * (3 if resident else 1),
        prefetch=False,
    )
    turn = policy.quantum_s or 1.0
    round_s = len(ENGINES) * (turn + switch_s(hardware, switching, resident))
    return SimGpu(arbiter, workers).run(until=rounds * round_s)


def main() -> None:
    print(
        "| case | S, s | Q at 5/10/20 % waste, s | simulated waste |"
        " Q for a wait of 1/2 s |"
    )
    print("|---|---|---|---|---|")
    for name, hardware, switching, resident in CASES:
        cost = switch_s(hardware, switching, resident)
        quanta = [quantum_for_overhead(cost, waste) for waste in WASTES]
        wasted = [
            1
            - simulate(
                hardware, switching, resident, QuantumScheduler(quantum_s=quantum)
            ).utilisation
            for quantum in quanta
        ]
        caps = [quantum_cap(cost, wait, len(ENGINES)) for wait in (1.0, 2.0)]
        shown = " / ".join(f"{cap:.3f}" if cap > 0 else "infeasible" for cap in caps)
        turns = " / ".join(f"{quantum:.2f}" for quantum in quanta)
        wastes = " / ".join(f"{waste:.1%}" for waste in wasted)
        print(f"| {name} | {cost:.3f} | {turns} | {wastes} | {shown} |")


if __name__ == "__main__":
    main()
