"""A seal on policies: no clock and no chance but what they are given.

Calls are watched, not replaced: a clock is known whatever name it goes by in
the module that calls it, and other threads and event loops keep theirs.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import opcode
import os
import pickle
import random
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np

_CLOCKS = {
    getattr(time, f"{name}{unit}"): f"time.{name}{unit}"
    for name in (
        *("time", "monotonic", "perf_counter", "process_time", "thread_time"),
        "clock_gettime",
    )
    for unit in ("", "_ns")
    if hasattr(time, name)
}
# With so many arguments they ask what time it is; with one more they convert.
_ASKS_WITH = {
    time.localtime: 0,
    time.gmtime: 0,
    time.ctime: 0,
    time.asctime: 0,
    time.strftime: 1,
}
_NOW = ("now", "utcnow", "today")
_ENTROPY = tuple(
    getattr(os, name) for name in ("urandom", "getrandom") if hasattr(os, name)
)
_SHARED = random.random.__self__  # type: ignore[attr-defined]
# A log line carries the time and no decision sees it; a copy of a generator
# draws a seed before it takes over the state of the original.
_MAY_ASK = ("logging", "copy", "numpy.random._pickle")
_CALL = opcode.opmap["CALL"]


class Cheated(AssertionError):
    """A policy used a clock or randomness that it was not given."""


@contextlib.contextmanager
def sealed() -> Iterator[None]:
    """Let every clock and every source of chance raise `Cheated` here.

    That is all of `time` and `datetime` that tells the time, the shared
    generators of `random` and `numpy.random`, the system's entropy (`secrets`,
    `uuid`), and generators made without a seed.  A seeded one is no cheat.  Who
    catches what is raised is found out all the same, at the end.

    Only this thread is watched, and only what Python code calls: a clock that C
    code asks, as in `map(time.time, ())`, is missed, and draws of `numpy.random`
    are seen at the end, by what they left behind.  `numpy.random.RandomState`
    draws a seed even if it is given one: use `default_rng(seed)`.

    >>> with sealed():
    ...     time.monotonic()
    Traceback (most recent call last):
    ...
    llmd.testing.seal.Cheated: time.monotonic is not view.now
    """
    caught: list[Cheated] = []

    def watch(frame: FrameType, event: str, called: Any) -> None:
        cheat = _cheat(frame, event, called)
        if cheat is not None:
            caught.append(Cheated(cheat))
            raise caught[0]

    states = _states()
    with _watched(watch):
        try:
            yield
        finally:
            if caught:
                raise caught[0]
    for name, state in _states().items():
        if state != states[name]:
            raise Cheated(f"{name}, which all share, is not view.rng")


@contextlib.contextmanager
def _watched(watch: Callable[[FrameType, str, Any], None]) -> Iterator[None]:
    """Let *watch* see every call of this thread.

    No garbage is collected meanwhile, as what others do at a collection may
    read clocks.
    """
    collects, before = gc.isenabled(), sys.getprofile()
    gc.disable()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()


def _cheat(frame: FrameType, event: str, called: Any) -> str | None:
    """Say what is wrong with the call that *event* is, if anything."""
    if event == "call":
        what = _unseeded(frame)
    elif event == "c_call":
        what = _time(frame, called) or _chance(called)
    else:
        return None
    return None if what is None or _may_ask(frame) else what


def _unseeded(frame: FrameType) -> str | None:
    if frame.f_code is uuid.uuid1.__code__:
        return "uuid.uuid1 is not view.now"
    if frame.f_code is random.Random.seed.__code__ and frame.f_locals["a"] is None:
        return "random.Random without a seed is not view.rng"
    return None


def _time(frame: FrameType, called: Any) -> str | None:
    owner, name = called.__self__, called.__name__
    if name in _NOW and isinstance(owner, type) and issubclass(owner, datetime.date):
        return f"{owner.__name__}.{name} is not view.now"
    if called in _CLOCKS:
        return f"{_CLOCKS[called]} is not view.now"
    if called in _ASKS_WITH and _arguments(frame) == _ASKS_WITH[called]:
        return f"time.{name} without a time is not view.now"
    return None


def _chance(called: Any) -> str | None:
    if called.__self__ is _SHARED:
        return "random, which all share, is not view.rng"
    if called in _ENTROPY:
        return f"os.{called.__name__}, which seeds what has no seed, is not view.rng"
    return None


def _arguments(frame: FrameType) -> int | None:
    """Count the arguments of the call *frame* is at; None if they are starred."""
    code = frame.f_code.co_code
    plain = code[frame.f_lasti] == _CALL
    return code[frame.f_lasti + 1] if plain else None


def _may_ask(frame: FrameType) -> bool:
    """Say whether the call is by, or close below, a module that may ask."""
    above: FrameType | None = frame
    for _ in range(3):
        if above is not None:
            if above.f_globals.get("__name__") in _MAY_ASK:
                return True
            above = above.f_back
    return False


def _states() -> dict[str, bytes]:
    """Return the states of the generators that all share."""
    return {
        "random": pickle.dumps(random.getstate()),
        "numpy.random": pickle.dumps(np.random.get_state()),
    }
