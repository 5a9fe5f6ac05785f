"""Medians, and two things timed in turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ROUNDS = 41


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector from striking one side only."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def seconds(call: Callable[[], object], calls: int) -> float:
    """Return the mean seconds of one of *calls* calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def median(call: Callable[[], object], calls: int = 1, rounds: int = ROUNDS) -> float:
    """Return the median over rounds of the seconds of a call, after a warm-up."""
    call()
    with no_collection():
        return statistics.median(seconds(call, calls) for _ in range(rounds))


def in_turns(
    *calls: Callable[[], object], repeat: int = 1, rounds: int = ROUNDS
) -> list[float]:
    """Return the median seconds of each call, all taking turns in every round.

    Whatever else the machine does meanwhile then strikes all alike.
    """
    for call in calls:
        call()
    taken: list[list[float]] = [[] for _ in calls]
    with no_collection():
        for _ in range(rounds):
            for call, times in zip(calls, taken, strict=True):
                times.append(seconds(call, repeat))
    return [statistics.median(times) for times in taken]
