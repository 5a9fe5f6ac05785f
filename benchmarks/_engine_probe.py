"""Times the steps of a real engine, and what lies between it and its client."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import attrs
import numpy as np
from _sites import Site

import llmd
from llmd.live import Server
from llmd.machines.fit import Step

_JOINING = 3
"""Prompts, one after the other, whose steps are told apart by their sum only."""


class Asked(llmd.Router):
    """Sends a request to the worker that its session names."""

    def cost(self, request: llmd.Request, view: llmd.View) -> np.ndarray:
        return np.array([float(id != request.session) for id in view.workers.ids])


@attrs.define
class Prober:
    """Asks one engine for prompts and batches of all sizes, one after the other.

    Where a client shares cores with engines, what it does for a token is part of
    what users wait for: answers are streamed through the server then, whose router
    is `Asked`, as they are under load.  Where it does not, that would only make
    stamps of large batches late.

    Attributes:
        ahead: It schedules a step while the one before runs.
        steps: What its steps took.
        rests: Of prompts: tokens, and the seconds of its time to first token in
            which the engine did not compute it.
    """

    server: Server
    worker: str
    site: Site
    ahead: bool
    steps: list[Step] = attrs.field(factory=list)
    rests: list[tuple[int, float]] = attrs.field(factory=list)
    _count: Any = attrs.field(factory=itertools.count, init=False)
    _drawn_heads: list[list[int]] = attrs.field(factory=list, init=False)
    _rng: Any = attrs.field(factory=lambda: np.random.default_rng(5), init=False)

    async def run(self) -> None:
        """Ask, and add to what was found before."""
        site, steps, rests = self.site, len(self.steps), len(self.rests)
        await self.prefill(max(site.prompts), [])
        await self.decode(max(site.batches), 32)
        del self.steps[steps:], self.rests[rests:]  # that was to warm up
        for context in site.contexts:
            (head,) = await self._heads(1, context)
            for tokens in site.prompts:
                await self.prefill(tokens, head)
        await self._chunks(4)
        for context in (32, *site.contexts[1:]):
            for requests in site.batches:
                if requests * context <= site.cached:
                    await self.decode(requests, context)
        some = site.joining, site.batches[2:5:2], (False, True)
        for tokens, requests, cached in itertools.product(*some):
            await self._mixed(tokens, requests, site.contexts[1], cached=cached)

    async def prefill(self, tokens: int, head: list[int]) -> None:
        """Ask an idle engine twice, behind a *head* that is cached."""
        for _ in range(2):
            own = self._drawn(tokens)
            computed, waited = await self._first([*head, *own])
            self.steps.append(Step(len(own), len(head), 0, 0, computed))
            self.rests.append((len(head) + len(own), waited - computed))

    async def _heads(self, requests: int, context: int) -> list[list[int]]:
        """Return that many heads of prompts, all different, that are cached.

        What several requests share is read from nearby: as if there were less.
        """
        while len(self._drawn_heads) < requests:
            self._drawn_heads.append(self._tokens(max(self.site.contexts)))
        heads = [head[:context] for head in self._drawn_heads[:requests]]
        if context:
            await asyncio.gather(*(self._first([*head, 7]) for head in heads))
        return heads

    async def _chunks(self, count: int) -> None:
        """Time full steps of one prompt: the next is made ready during each."""
        size = self.site.step_tokens
        last = [(await self._first(self._tokens(size)))[0] for _ in range(3)]
        long = [(await self._first(self._tokens(size * count)))[0] for _ in range(3)]
        seconds = statistics.median(long) - statistics.median(last)
        self.steps.append(Step(size, size * count / 2, 0, 0, seconds / (count - 1)))

    async def decode(self, requests: int, context: int) -> None:
        """Let *requests* generate together and take the gaps while all do."""
        new = self.site.answer
        arrivals = await asyncio.gather(
            *(
                self._told([*head, *self._tokens(1)], new, [])
                for head in await self._heads(requests, context)
            )
        )
        begun = max(times[0] for times in arrivals)
        over = min(times[-1] for times in arrivals)
        inside = [t for t in arrivals[0] if begun < t < over]
        if len(inside) < 8:
            return
        # The mean, as one slow step in a few is a step that users wait for.
        gap = (inside[-1] - inside[0]) / (len(inside) - 1)
        middle = requests * (context + new / 2)
        self.steps.append(Step(0, 0, requests, middle, gap))

    async def _mixed(
        self, tokens: int, requests: int, context: int, *, cached: bool
    ) -> None:
        """Let a prompt join *requests* that generate, and time the step of both.

        An engine that schedules a step when the one before is over tells what that
        step took.  One that schedules ahead does not, and which of its tokens is
        late depends on when it looks at the outcome of a step: so no single gap is
        the step, but what all of them together took longer for some prompts, one
        after the other, is that of those prompts.
        """
        before, count = self.site.answer // 2, _JOINING if self.ahead else 1
        drawn = [self._drawn(tokens) for _ in range(count)]
        heads = await self._heads(requests, context)
        ahead = heads[0] if cached else []
        running: list[list[float]] = [[] for _ in range(requests)]

        async def joins() -> tuple[float, float, float]:
            while min(map(len, running)) < before:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            asked = time.monotonic()
            computed = [(await self._first([*ahead, *own]))[0] for own in drawn]
            return statistics.median(computed), asked, time.monotonic()

        new = 2 * self.site.answer
        (step, *span), *_ = await asyncio.gather(
            joins(),
            *(
                self._told([*head, *self._tokens(1)], new, times)
                for head, times in zip(heads, running, strict=True)
            ),
        )
        if self.ahead:
            step = statistics.median([longer(times, *span, count) for times in running])
        at = requests * (context + before + 1.0)
        size = statistics.mean(map(len, drawn))
        self.steps.append(Step(size, len(ahead), requests, at, step))

    async def _told(
        self, tokens: list[int], new: int, times: list[float]
    ) -> list[float]:
        """Note in *times* when each token of an answer came."""
        stream = self._served if self.site.shared else self._direct
        async for count in stream(tokens, new):
            times += [time.monotonic()] * count
        return times

    async def _served(self, tokens: list[int], new: int) -> AsyncIterator[int]:
        request = llmd.Request(
            id=f"{self.worker}-{next(self._count)}",
            prompt=tokens,
            max_new_tokens=new,
            session=self.worker,
        )
        sampling = {"ignore_eos": True, "temperature": 0.0}
        async for piece in self.server.generate(request, sampling):
            yield len(piece.token_ids)

    async def _direct(self, tokens: list[int], new: int) -> AsyncIterator[int]:
        async for piece in self._ask(tokens, new):
            yield len(piece.outputs[0].token_ids)

    async def _first(self, tokens: list[int]) -> tuple[float, float]:
        """Return the seconds to compute a prompt, and to the first token.

        The engine's stamps tell the former, which only vLLM's own client is told.
        """
        begun = time.monotonic()
        async for piece in self._ask(tokens, 1):
            if piece.outputs[0].token_ids:
                waited = time.monotonic() - begun
                # By the engine's own clock, which on Linux is this one.
                said = piece.metrics
                return said.first_token_ts - said.scheduled_ts, waited
        raise RuntimeError("no token came")

    def _ask(self, tokens: list[int], new: int) -> AsyncIterator[Any]:
        from vllm.sampling_params import RequestOutputKind

        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=new,
            ignore_eos=True,
            temperature=0.0,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt, id = {"prompt_token_ids": tokens}, f"probe{next(self._count)}"
        engine: Any = self.server.engines[self.worker]
        stream: AsyncIterator[Any] = engine._llm.generate(prompt, sampling, id)
        return stream

    def _drawn(self, most: int) -> list[int]:
        """Return a prompt of a length near *most*: no two that clients send are alike.

        An engine is slower with a size it has not had lately.
        """
        return self._tokens(int(self._rng.integers(most * 4 // 5, most + 1)))

    def _tokens(self, count: int) -> list[int]:
        tokens: list[int]
        tokens = self._rng.integers(10, self.site.vocabulary - 10, count).tolist()
        return tokens


def longer(times: Sequence[float], asked: float, came: float, steps: int) -> float:
    """Return what each of *steps* took that were not like the others.

    They are among those between *asked* and *came*.
    """
    first = int(np.searchsorted(times, asked)) - 1
    last = min(int(np.searchsorted(times, came)) + 2, len(times) - 1)
    usual = (times[first] - times[4]) / (first - 4)
    return (times[last] - times[first] - usual * (last - first - steps)) / steps


def intake(rests: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return seconds, and seconds a token, that fit *rests* best (Theil and Sen)."""
    tokens, seconds = np.array(rests, dtype=np.float64).T
    apart = np.subtract.outer(tokens, tokens)
    slopes = np.subtract.outer(seconds, seconds)[apart > 0] / apart[apart > 0]
    slope = max(float(np.median(slopes)), 0.0)
    return max(float(np.median(seconds - slope * tokens)), 0.0), slope
