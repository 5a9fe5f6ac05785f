"""Modelled GPUs for tests: engines with more to do than they can."""

import attrs

from llmd.machines import Machine
from llmd.sim.gpu import GpuWorker, Job, SimGpu
from llmd.timeslice import GpuArbiter, Sharer

STEP_S = 0.005
FAST = attrs.evolve(Machine(), prefill_floor_s=STEP_S, decode_floor_s=STEP_S, knee=2.5)
"""A machine whose steps take about as long whatever is in them."""


def endless(requests=4, priority=0):
    """Requests that never end."""
    return [
        Job(arrived_at=0.0, prompt_tokens=16, new_tokens=10**9, priority=priority)
    ] * requests


def worker(name, jobs, *, weight=1.0, switch_s=0.02, **sharer):
    sharer = {"resume_s": switch_s, **sharer}
    return GpuWorker(
        Sharer(engine=name, weight=weight, **sharer), machine=FAST, jobs=jobs
    )


def run(policy, workers, until, *, memory_bytes=float("inf"), prefetch=False, **faults):
    timeout_s = faults.pop("timeout_s", 60.0)
    arbiter = GpuArbiter(
        policy, memory_bytes=memory_bytes, prefetch=prefetch, timeout_s=timeout_s
    )
    gpu = SimGpu(arbiter, workers, **faults)
    return gpu.run(until)
