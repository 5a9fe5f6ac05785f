"""Generators of workloads: the study's four, and prefixes shared by groups.

Lengths are log-normal around a median, as in public traces; the defaults of
each generator are in its signature and mean what its docstring says.  Equal
arguments and seed give equal workloads in every process.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from ..amounts import as_real, as_whole
from ..errors import InvalidRequest, shown
from ..types import Request
from ..view import Ints
from .arrivals import gamma
from .prompts import Segment, SegmentPrompt, mix
from .workload import Job, Workload

_LONGEST = 1 << 24


def _lengths(
    rng: np.random.Generator, median: float, spread: float, size: int, most: int
) -> Ints:
    """Draw log-normal lengths from 1 to *most* tokens, or to 4 medians if more."""
    if not (0.0 < as_real(median) <= _LONGEST):
        raise InvalidRequest(f"a median of {shown(median)} tokens is no length")
    most = max(most, math.ceil(4.0 * median))
    drawn = median * np.exp(spread * rng.standard_normal(size))
    return np.clip(np.rint(drawn), 1, most).astype(np.int64)


def _at_least(least: int, **given: float) -> None:
    for name, value in given.items():
        if not least <= as_real(value) < math.inf:
            raise InvalidRequest(f"{name} is {shown(value)}, must be at least {least}")


def _count(least: int, **given: int) -> None:
    _at_least(least, **given)
    for name, value in given.items():
        if as_whole(value) is None:
            raise InvalidRequest(f"{name} is {value}, must be a whole number")


class _Texts:
    """Numbers for texts that nobody else has."""

    def __init__(self, seed: int, kind: str) -> None:
        self._root = mix(int(seed) * 1_000_003 + sum(kind.encode()))
        self._made = 0

    def new(self, tokens: int) -> Segment:
        self._made += 1
        return mix(self._root + self._made), int(tokens)


def dialogue(
    *,
    rate: float = 4.0,
    requests: int = 1000,
    turns: float = 5.0,
    system_tokens: int = 400,
    system_prompts: int = 4,
    question_tokens: float = 60.0,
    answer_tokens: float = 180.0,
    think_s: float = 10.0,
    burstiness: float = 1.0,
    seed: int = 0,
) -> Workload:
    """Make interactive dialogues: many short turns, each on top of the last.

    Args:
        rate: Requests a second, all turns counted.
        requests: Turns in all.
        turns: Mean turns of a dialogue (geometric).
        system_tokens: Length of each system prompt.
        system_prompts: How many there are; dialogues choose one.
        question_tokens: Median length of what a user says.
        answer_tokens: Median length of an answer.
        think_s: Mean seconds from an answer to the next question.
        burstiness: Of the starts of dialogues; 1 is Poisson.
        seed: Of all that is drawn.
    """
    _at_least(1, turns=turns)
    _at_least(0, think_s=think_s)
    _count(1, requests=requests, system_prompts=system_prompts)
    _count(1, system_tokens=system_tokens)
    _count(0, seed=seed)
    arguments = dict(locals())
    del arguments["seed"]
    rng, texts = np.random.default_rng((seed, 1)), _Texts(seed, "dialogue")
    systems = [texts.new(system_tokens) for _ in range(system_prompts)]
    starts = gamma(rate / turns, requests, rng, burstiness)
    questions = _lengths(rng, question_tokens, 0.8, requests, 4096)
    answers = _lengths(rng, answer_tokens, 0.6, requests, 2048)
    thinks = rng.exponential(think_s, requests) if think_s else np.zeros(requests)
    jobs: list[Job] = []
    for start in starts:
        if len(jobs) >= requests:
            break
        session = f"d{len(jobs)}"
        prompt = SegmentPrompt([systems[int(rng.integers(system_prompts))]])
        before = ""
        for turn in range(int(rng.geometric(1.0 / turns))):
            row = len(jobs)
            if row >= requests:
                break
            prompt = prompt.followed(texts.new(questions[row]))
            answer = prompt.followed(texts.new(answers[row]))
            request = Request(
                id=f"{session}.{turn}", prompt=prompt, session=session, tenant=session
            )
            jobs.append(
                Job(
                    request=request,
                    output_tokens=int(answers[row]),
                    at=float(start),
                    answer=answer,
                    follows=before,
                    think_s=float(thinks[row]),
                )
            )
            before, prompt = request.id, answer
    make = functools.partial(_again, dialogue, arguments)
    return Workload(name="dialogue", jobs=jobs, remake=make)


def documents(
    *,
    rate: float = 1.0,
    requests: int = 300,
    document_tokens: float = 8000.0,
    questions_per_document: float = 2.0,
    question_tokens: float = 40.0,
    answer_tokens: float = 120.0,
    burstiness: float = 1.0,
    seed: int = 0,
) -> Workload:
    """Make questions on long documents: heavy prefill, light decoding.

    Args:
        rate: Requests a second.
        requests: How many.
        document_tokens: Median length of a document.
        questions_per_document: Mean questions on each, at random times.
        question_tokens: Median length of a question.
        answer_tokens: Median length of an answer.
        burstiness: Of arrivals; 1 is Poisson.
        seed: Of all that is drawn.
    """
    _at_least(1, questions_per_document=questions_per_document)
    _count(1, requests=requests)
    _count(0, seed=seed)
    arguments = dict(locals())
    del arguments["seed"]
    rng, texts = np.random.default_rng((seed, 2)), _Texts(seed, "documents")
    count = max(math.ceil(requests / max(questions_per_document, 1.0)), 1)
    lengths = _lengths(rng, document_tokens, 0.5, count, 100_000)
    shelf = [texts.new(tokens) for tokens in lengths]
    chosen = rng.integers(count, size=requests)
    return _single(
        "documents",
        [[shelf[row]] for row in chosen],
        [f"document-{row}" for row in chosen],
        question_tokens,
        answer_tokens,
        gamma(rate, requests, rng, burstiness),
        (rng, texts),
        functools.partial(_again, documents, arguments),
    )


def batch(
    *,
    rate: float = 20.0,
    requests: int = 1000,
    prompt_tokens: float = 300.0,
    answer_tokens: float = 400.0,
    burstiness: float = 0.0,
    seed: int = 0,
) -> Workload:
    """Make batch generation: much output, nothing shared, latency secondary.

    Args:
        rate: Requests a second.
        requests: How many.
        prompt_tokens: Median length of a prompt.
        answer_tokens: Median length of an answer.
        burstiness: Of arrivals; 0 sends them evenly.
        seed: Of all that is drawn.
    """
    _count(1, requests=requests)
    _count(0, seed=seed)
    arguments = dict(locals())
    del arguments["seed"]
    rng, texts = np.random.default_rng((seed, 3)), _Texts(seed, "batch")
    return _single(
        "batch",
        [[] for _ in range(requests)],
        ["batch"] * requests,
        prompt_tokens,
        answer_tokens,
        gamma(rate, requests, rng, burstiness),
        (rng, texts),
        functools.partial(_again, batch, arguments),
        priority=1,
    )


def shared_prefix(
    *,
    rate: float = 10.0,
    requests: int = 1000,
    groups: int = 150,
    users_per_group: int = 5,
    system_tokens: int = 6000,
    question_tokens: int = 1200,
    answer_tokens: int = 1000,
    in_rounds: bool = False,
    burstiness: float = 1.0,
    seed: int = 0,
) -> Workload:
    """Make groups of users behind one long system prompt each.

    The defaults are those of llm-d's 73-capacity benchmark, where each user
    asks the same question again and again.

    Args:
        rate: Requests a second.
        requests: How many.
        groups: System prompts.
        users_per_group: Users, with a question each, of each of them.
        system_tokens: Length of each system prompt.
        question_tokens: Length of each question.
        answer_tokens: Length of each answer.
        in_rounds: Nobody asks again before all have asked.
        burstiness: Of arrivals; 1 is Poisson.
        seed: Of all that is drawn.
    """
    _count(1, requests=requests, groups=groups, users_per_group=users_per_group)
    _count(1, system_tokens=system_tokens, question_tokens=question_tokens)
    _count(1, answer_tokens=answer_tokens)
    _count(0, seed=seed)
    arguments = dict(locals())
    del arguments["seed"]
    rng, texts = np.random.default_rng((seed, 4)), _Texts(seed, "shared")
    systems = [texts.new(system_tokens) for _ in range(groups)]
    users = [
        (group, SegmentPrompt([systems[group], texts.new(question_tokens)]))
        for group in range(groups)
        for _ in range(users_per_group)
    ]
    times = gamma(rate, requests, rng, burstiness)
    jobs = []
    asking = rng.integers(len(users), size=requests)
    if in_rounds:
        rounds = [
            rng.permutation(len(users)) for _ in range(-(-requests // len(users)))
        ]
        asking = np.concatenate(rounds)[:requests]
    for row, user in enumerate(asking.tolist()):
        group, prompt = users[user]
        request = Request(id=f"s{row}", prompt=prompt, tenant=f"group-{group}")
        jobs.append(
            Job(request=request, output_tokens=answer_tokens, at=float(times[row]))
        )
    make = functools.partial(_again, shared_prefix, arguments)
    return Workload(name="shared_prefix", jobs=jobs, remake=make)


def mixed(*, rate: float = 6.0, requests: int = 1000, seed: int = 0) -> Workload:
    """Make half dialogue, a fifth documents and the rest batch, side by side.

    Args:
        rate: Requests a second of all together.
        requests: How many in all.
        seed: Of all that is drawn.
    """
    _count(3, requests=requests)
    _at_least(0, rate=rate)
    arguments = {"rate": rate, "requests": requests}
    long, many = max(round(requests * 0.2), 1), max(round(requests * 0.3), 1)
    parts = (
        dialogue(rate=rate * 0.5, requests=requests - long - many, seed=seed),
        documents(rate=rate * 0.2, requests=long, seed=seed),
        batch(rate=rate * 0.3, requests=many, seed=seed),
    )
    jobs = [job for part in parts for job in part.jobs]
    again = functools.partial(_again, mixed, arguments)
    return Workload(name="mixed", jobs=jobs, remake=again)


def _single(
    name: str,
    heads: list[list[Segment]],
    tenants: list[str],
    question_tokens: float,
    answer_tokens: float,
    times: np.typing.NDArray[np.float64],
    drawn: tuple[np.random.Generator, _Texts],
    remake: Callable[[int], Workload],
    priority: int = 0,
) -> Workload:
    """Make requests that stand alone, each behind its head."""
    (rng, texts), size = drawn, len(heads)
    questions = _lengths(rng, question_tokens, 0.6, size, 16_384)
    answers = _lengths(rng, answer_tokens, 0.5, size, 4096)
    jobs = [
        Job(
            request=Request(
                id=f"{name}{row}",
                prompt=SegmentPrompt([*heads[row], texts.new(questions[row])]),
                tenant=tenants[row],
                priority=priority,
            ),
            output_tokens=int(answers[row]),
            at=float(times[row]),
        )
        for row in range(size)
    ]
    return Workload(name=name, jobs=jobs, remake=remake)


def _again(
    make: Callable[..., Workload], arguments: dict[str, float], seed: int
) -> Workload:
    return make(**arguments, seed=seed)
