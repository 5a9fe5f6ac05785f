"""Workloads from the profiles of kubernetes-sigs/inference-perf."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..amounts import as_whole
from ..errors import InvalidRequest, shown
from ..types import Request
from ..view import Floats
from .arrivals import poisson
from .prompts import SegmentPrompt, mix
from .workload import Job, Workload

_Profile = Mapping[str, Any]
_NOTHING = {"min": 0.0, "max": 0.0, "mean": 0.0, "standard_deviation": 0.0}


def from_profile(
    profile: _Profile, requests: int, rate: float, seed: int, name: str = "profile"
) -> Workload:
    """Draw a workload from a profile's `config.json`.

    A conversation starts with the shared system prompt and a text of its own
    of `input_sequence_length`; each turn adds `input_sequence_length_per_turn`
    and an answer.  Profiles of recorded traces say nothing of turns' growth:
    their mean input is spread evenly over the mean number of turns.

    Raises:
        InvalidRequest: The profile lacks what no workload can do without.
    """
    known = as_whole(seed)
    if (as_whole(requests) or 0) < 1 or known is None or known < 0:
        raise InvalidRequest(
            f"requests is {shown(requests)} and seed {shown(seed)}: want whole numbers"
        )
    seed = known
    rng = np.random.default_rng((seed, 6))
    for key in ("input_sequence_length", "output_sequence_length"):
        if key not in profile:
            raise InvalidRequest(f"the profile {name!r} has no {key!r}")
    turns = np.maximum(_draw(profile.get("number_of_turns"), requests, rng), 1)
    kept = int(np.searchsorted(np.cumsum(np.rint(turns)), requests)) + 1
    starts = poisson(rate / float(turns[:kept].mean()), kept, rng)
    jobs: list[Job] = []
    for row in range(kept):
        most = min(round(float(turns[row])), requests - len(jobs))
        jobs += _conversation(profile, row, most, float(starts[row]), seed, rng)
    remake = functools.partial(_again, dict(profile), requests, rate, name)
    return Workload(name=name, jobs=jobs, remake=remake)


def _again(
    profile: _Profile, requests: int, rate: float, name: str, seed: int
) -> Workload:
    return from_profile(profile, requests, rate, seed, name)


def _conversation(
    profile: _Profile,
    row: int,
    turns: int,
    start: float,
    seed: int,
    rng: np.random.Generator,
) -> list[Job]:
    """Draw the turns of one conversation."""
    root = mix(seed * 1_000_003 + row + 1)
    system = int(_draw(profile.get("system_prompt"), 1, rng)[0])
    own, grown = _growth(profile, turns, rng)
    answers = np.maximum(_draw(profile["output_sequence_length"], turns, rng), 1)
    thinks = _draw(profile.get("time_between_turns"), turns, rng)
    heads = [(mix(seed + 7), system), (mix(root), own)]
    prompt = SegmentPrompt([head for head in heads if head[1] > 0] or [(root, 1)])
    jobs: list[Job] = []
    for turn in range(turns):
        if grown[turn] >= 1:
            prompt = prompt.followed((mix(root + 2 * turn + 1), int(grown[turn])))
        tokens = int(answers[turn])
        answer = prompt.followed((mix(root + 2 * turn + 2), tokens))
        request = Request(
            id=f"c{row}.{turn}", prompt=prompt, session=f"c{row}", tenant=f"c{row}"
        )
        jobs.append(
            Job(
                request=request,
                output_tokens=tokens,
                at=start,
                answer=answer,
                follows=jobs[-1].id if jobs else "",
                think_s=float(thinks[turn]),
            )
        )
        prompt = answer
    return jobs


def _growth(
    profile: _Profile, turns: int, rng: np.random.Generator
) -> tuple[int, Floats]:
    """Return a conversation's own text, and what each of its turns adds to it."""
    inputs = profile["input_sequence_length"]
    if "input_sequence_length_per_turn" in profile:
        own = int(_draw(inputs, 1, rng)[0])
        return own, _draw(profile["input_sequence_length_per_turn"], turns, rng)
    if "number_of_turns" not in profile:
        return int(_draw(inputs, 1, rng)[0]), np.zeros(turns)
    even = float(inputs["mean"]) / max(float(profile["number_of_turns"]["mean"]), 1.0)
    grown = np.full(turns, even)
    grown[0] = 0.0  # its first text is its own
    return int(even), grown


def _draw(
    shape: Mapping[str, Any] | None, size: int, rng: np.random.Generator
) -> Floats:
    """Draw from one distribution of a profile, clipped to its bounds."""
    shape = _NOTHING if shape is None else shape
    mean, deviation = float(shape["mean"]), float(shape["standard_deviation"])
    kind = shape.get("distribution_type", "log_normal")
    if deviation <= 0 or mean <= 0:
        drawn = np.full(size, mean)
    elif kind == "log_normal":
        spread = np.log1p((deviation / mean) ** 2)
        drawn = rng.lognormal(np.log(mean) - spread / 2, np.sqrt(spread), size)
    elif kind == "normal":
        drawn = rng.normal(mean, deviation, size)
    elif kind == "exponential":
        drawn = rng.exponential(mean, size)
    elif kind == "uniform":
        drawn = rng.uniform(float(shape["min"]), float(shape["max"]), size)
    elif kind == "bimodal":
        # Two equal halves, each as far from the mean as the deviation says.
        side = rng.integers(0, 2, size) * 2 - 1
        drawn = mean + side * deviation
    else:
        raise InvalidRequest(f"a profile has the distribution {kind!r}")
    clipped: Floats = np.clip(drawn, float(shape["min"]), float(shape["max"]))
    return clipped
