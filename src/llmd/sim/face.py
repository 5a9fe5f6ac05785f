"""One call for one run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs

from ..amounts import as_whole
from ..cluster import Cluster
from ..errors import InvalidRequest, PolicyError, shown
from ..machines import Machine
from ..router import Router
from ..types import Worker
from .engines import belongs
from .faults import Crash
from .report import Report, Slo
from .sequence import EngineSettings
from .simulator import Simulator
from .workload import Workload

Policy: TypeAlias = Router | Cluster | Callable[[], Cluster]

# One H200 with a model of 8B parameters in bf16 holds about this much KV.
_KV_TOKENS = 816_000


def fleet(
    workers: int,
    *,
    block_tokens: int = 16,
    kv_tokens: int = _KV_TOKENS,
    max_running: int = 256,
) -> list[Worker]:
    """Make *workers* equal workers.

    Args:
        workers: How many.
        block_tokens: Tokens a KV block.
        kv_tokens: Tokens the KV cache of each holds; by default those of an
            8B model on an H200.
        max_running: Requests each batches at once.
    """
    if as_whole(workers) is None or (as_whole(block_tokens) or 0) < 1:
        raise InvalidRequest(
            f"{shown(workers)} workers with blocks of {shown(block_tokens)} tokens:"
            " want whole numbers"
        )
    return [
        Worker(
            id=f"w{row:03}",
            kv_blocks=kv_tokens // block_tokens,
            block_tokens=block_tokens,
            max_model_tokens=kv_tokens,
            max_running=max_running,
        )
        for row in range(workers)
    ]


def simulate(
    policy: Policy,
    workload: Workload,
    *,
    workers: int | Iterable[Worker] = 8,
    machine: Machine | None = None,
    machines: Mapping[str, Machine] | None = None,
    settings: EngineSettings | None = None,
    crashes: Iterable[Crash] = (),
    signals_s: float = 0.0,
    give_up: Slo | None = None,
    progress: bool = False,
) -> Report:
    """Run *policy* on *workload* in virtual time.

    The policy is copied, so that one object can be compared again and again.  What
    a function of its own has closed over is not: a lambda over `self` goes on
    changing the original; a method does not.

    Args:
        policy: A router, a cluster not used before, or a function making one.
        workload: What arrives.
        workers: How many equal workers, `w000` and so on, or the workers themselves.
        machine: Step times of each that names no machine of *machines*.
        machines: Step times by the name in `Worker.machine`, for a mixed fleet.
        settings: How each schedules.
        crashes: Workers that die on the way.
        signals_s: Seconds between two reports of each engine; 0 for none.
        give_up: Stop as soon as this cannot be met any more.
        progress: Show a bar (needs tqdm).

    Raises:
        InvalidRequest: *policy* is none, there is no worker, or none that names one
            of *machines*.
        PolicyError: The policy raised, broke its contract or cannot be copied.

    >>> from llmd import RoundRobin
    >>> from llmd.sim import workloads
    >>> simulate(RoundRobin(), workloads.batch(requests=40), workers=2).completed
    40
    """
    cluster = make_cluster(policy)
    workers = members(workers, workload.block_tokens)
    known = {worker.machine for worker in workers}
    if machines and cluster.autoscaler is None and known.isdisjoint(machines):
        raise InvalidRequest(
            f"no worker names one of the machines {sorted(machines)}: {sorted(known)}"
        )
    simulator = Simulator(
        cluster,
        machine=machine or Machine(),
        machines=machines or {},
        settings=settings or EngineSettings(),
        spawn=functools.partial(_another, workers, machines or {}),
        crashes=(crashes,) if isinstance(crashes, Crash) else tuple(crashes),
        signals_s=signals_s,
    )
    if not progress:
        return simulator.run(workload, workers, give_up=give_up)
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    with tqdm(total=len(workload), unit="request") as bar:
        return simulator.run(
            workload,
            workers,
            give_up=give_up,
            progress=lambda done: bar.update(done - bar.n),
        )


def members(workers: int | Iterable[Worker], block_tokens: int) -> tuple[Worker, ...]:
    """Return the workers that were asked for.

    Raises:
        InvalidRequest: They are none.
    """
    found: tuple[Any, ...] = ()
    if isinstance(workers, Iterable):
        found = tuple(workers)
    elif (count := as_whole(workers)) is not None:
        found = tuple(fleet(count, block_tokens=block_tokens))
    if not found or not all(isinstance(worker, Worker) for worker in found):
        raise InvalidRequest(
            f"workers are {shown(workers)}: want how many, or some `Worker`s"
        )
    return found


def _another(
    workers: Sequence[Worker], machines: Mapping[str, Machine], row: int, pool: str
) -> Worker:
    """Make one more worker for *pool*: like the first of it, or else of all."""
    like = next((w for w in workers if belongs(w, pool)), workers[0])
    machine = pool if pool in machines else like.machine
    return attrs.evolve(like, id=f"{like.id}-{row}", machine=machine)


def make_cluster(policy: Policy) -> Cluster:
    """Return a cluster of its own for *policy*."""
    try:
        if isinstance(policy, Router):
            return Cluster(router=copy.deepcopy(policy))
        if isinstance(policy, Cluster):
            return policy.fork()
    except Exception as error:
        raise PolicyError(
            f"{shown(policy)} cannot be copied for a run of its own: {error}; give"
            " what it holds a __deepcopy__, or pass a function that makes a cluster"
        ) from error
    made = policy() if callable(policy) else policy
    if not isinstance(made, Cluster):
        raise InvalidRequest(
            f"{shown(policy)} makes {shown(made)}: want a router, a cluster or what"
            " makes one; a balancer goes into Cluster(balancer=...)"
        )
    return made
