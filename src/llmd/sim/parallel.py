"""Runs spread over processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from ..amounts import as_whole
from ..errors import InvalidRequest, shown

Result = TypeVar("Result")

# What all runs share reaches a process once, when it starts.
_shared: Any = None


def _begin(shared: Any) -> None:
    global _shared
    _shared = shared


def _call(task: Callable[[Any, int], Result], row: int) -> Result:
    return task(_shared, row)


def spread(
    task: Callable[[Any, int], Result], shared: Any, count: int, jobs: int
) -> list[Result]:
    """Return task(shared, row) for every row below *count*, in order.

    Processes are forked where the system can, so that policies written in a
    notebook need not be importable.

    Args:
        task: A function of a module.
        shared: What it works on.
        count: How often to call it.
        jobs: Processes; 1 stays in this one.
    """
    if (as_whole(jobs) or 0) < 1:
        raise InvalidRequest(f"jobs is {shown(jobs)}, must be how many processes")
    if jobs <= 1 or count <= 1:
        return [task(shared, row) for row in range(count)]
    methods: Sequence[str] = multiprocessing.get_all_start_methods()
    method = "fork" if "fork" in methods else "spawn"
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(
        min(jobs, count), context, initializer=_begin, initargs=(shared,)
    ) as pool:
        futures = [pool.submit(_call, task, row) for row in range(count)]
        return [future.result() for future in futures]
