"""Three models, one GPU: who has it when, and what a faster link is worth.

    python examples/time_slice.py [timeline.svg]

A chat model with twice the weight and urgent requests, and two models that
work through a pile; only one fits the GPU at a time.  The same policy object
runs on a modelled GH200 and on a modelled H200, whose host link is PCIe 5;
`llmd.live.SharedGpu` takes it to a real one.
"""

import sys

import attrs

from llmd.machines import GH200_96, H200, MIRRORED, Machine
from llmd.machines.shape import LLAMA31_8B
from llmd.sim.gpu import GpuReport, GpuWorker, Job, SimGpu
from llmd.timeslice import GpuArbiter, QuantumScheduler, Sharer

SECONDS = 20.0
COLOURS = {"chat": "#c2410c", "mail": "#1d4ed8", "code": "#047857"}
PILE = [Job(arrived_at=0.0, prompt_tokens=1024, new_tokens=1500)] * 60
CHAT = [
    Job(
        arrived_at=1.3 * n,
        prompt_tokens=300,
        new_tokens=80,
        priority=-1,
        deadline=1.3 * n + 0.5,
    )
    for n in range(15)
]


def run(hardware) -> GpuReport:
    machine = Machine.of(hardware, LLAMA31_8B)
    workers = []
    for name, weight, jobs in (("chat", 2, CHAT), ("mail", 1, PILE), ("code", 1, PILE)):
        sharer = attrs.evolve(Sharer.on(name, machine, MIRRORED), weight=float(weight))
        workers.append(GpuWorker(sharer, machine=machine, jobs=jobs))
    policy = QuantumScheduler(overhead=0.1, max_wait_s=2.0)
    arbiter = GpuArbiter(policy, memory_bytes=1.5 * machine.weights_bytes)
    return SimGpu(arbiter, workers).run(until=SECONDS)


def told(name: str, report: GpuReport) -> None:
    first = sorted(report.ttft_s["chat"])
    print(f"{name}: {report.utilisation:.0%} of the time in steps,")
    print(f"  chat answers after {first[len(first) // 2]:.2f} s (median)", end="")
    print(f", {first[-1]:.2f} s (worst)")
    complaints = [one.reason for one in report.complaints if one]
    print("  to the autoscaler:", complaints[0] if complaints else "nothing", "\n")


def picture(reports: dict[str, GpuReport]) -> str:
    """Draw each turn as a bar, and the switch before it in grey."""
    wide, bars = 40, []
    for row, (name, report) in enumerate(reports.items()):
        top = 20 + 60 * row
        bars.append(f'<text x="0" y="{top + 12}">{name}</text>')
        for turn in report.turns:
            for start, end, colour in (
                (turn.chosen_at, turn.began_at, "#bbb"),
                (turn.began_at, turn.ended_at, COLOURS[turn.engine]),
            ):
                bars.append(
                    f'<rect x="{90 + start * wide:.1f}" y="{top}" height="20"'
                    f' width="{(end - start) * wide:.2f}" fill="{colour}"/>'
                )
    for column, (name, colour) in enumerate((*COLOURS.items(), ("switch", "#888"))):
        bars.append(
            f'<text x="{90 + 80 * column}" y="150" fill="{colour}">{name}</text>'
        )
    size = f'width="{100 + SECONDS * wide:.0f}" height="160"'
    font = 'font-family="sans-serif" font-size="13"'
    body = "\n".join(bars)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>\n{body}\n</svg>\n'


if __name__ == "__main__":
    reports = {"GH200": run(GH200_96), "H200": run(H200)}
    for name, report in reports.items():
        told(name, report)
    path = sys.argv[1] if len(sys.argv) > 1 else "timeline.svg"
    with open(path, "w") as file:
        file.write(picture(reports))
    print("wrote", path)
