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

from llmd.adapters.vllm.engine import VllmEngine
from llmd.machines.fit import Step


@attrs.define
class Prober:
    """Asks one engine for prompts and batches of all sizes, one after the other.

    Attributes:
        steps: What its steps took.
        rests: Of prompts: tokens, and the seconds of its time to first token in
            which the engine did not compute it.
    """

    engine: VllmEngine
    site: Site
    steps: list[Step] = attrs.field(factory=list)
    rests: list[tuple[int, float]] = attrs.field(factory=list)
    _count: Any = attrs.field(factory=itertools.count, init=False)
    _rng: Any = attrs.field(factory=lambda: np.random.default_rng(5), init=False)

    async def run(self) -> None:
        """Ask, and add to what was found before."""
        site, steps, rests = self.site, len(self.steps), len(self.rests)
        await self.prefill(max(site.prompts), 0)
        await self.decode(max(site.batches), 32)
        del self.steps[steps:], self.rests[rests:]  # that was to warm up
        for context in site.contexts:
            for tokens in site.prompts:
                await self.prefill(tokens, context)
        await self._chunks(4)
        for context in site.contexts:
            for requests in site.batches:
                await self.decode(requests, max(context, 32))
        context = max(site.contexts[1], 32)
        for tokens, requests in itertools.product(site.prompts, site.batches[2::2]):
            for ahead in (0, context):
                await self._mixed(tokens, ahead, requests, context)

    async def prefill(self, tokens: int, context: int) -> None:
        """Ask an idle engine."""
        head = self._tokens(context)
        if context:
            await self._first([*head, 7])
        for _ in range(2):
            own = self._drawn(tokens)
            computed, waited = await self._first([*head, *own])
            self.steps.append(Step(len(own), context, 0, 0, computed))
            self.rests.append((context + len(own), waited - computed))

    async def _chunks(self, count: int) -> None:
        """Time full steps of one prompt: the next is made ready during each."""
        size = self.site.step_tokens
        last = [(await self._first(self._tokens(size)))[0] for _ in range(3)]
        long = [(await self._first(self._tokens(size * count)))[0] for _ in range(3)]
        seconds = statistics.median(long) - statistics.median(last)
        self.steps.append(Step(size, size * count / 2, 0, 0, seconds / (count - 1)))

    async def decode(self, requests: int, context: int) -> None:
        """Let *requests* generate together and take the gaps while all do."""
        new, head = 40, self._tokens(context)
        await self._first(head)
        arrivals = await asyncio.gather(
            *(self._told([*head, *self._tokens(1)], new, []) for _ in range(requests))
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
        self, tokens: int, ahead: int, requests: int, context: int
    ) -> None:
        """Let a prompt join *requests* that generate, and time the step of both.

        Which of their tokens is late depends on when the engine looks at the
        outcome of a step, and it has the next one ready by then: so no single gap
        is the step, but what all of them together took longer for the prompt is.
        """
        head, own = self._tokens(context), self._drawn(tokens)
        await self._first(head)
        running: list[list[float]] = [[] for _ in range(requests)]

        async def joins() -> tuple[float, float]:
            while min(map(len, running)) < 15:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            asked = time.monotonic()
            await self._first([*head[:ahead], *own])
            return asked, time.monotonic()

        span, *_ = await asyncio.gather(
            joins(),
            *(self._told([*head, *self._tokens(1)], 60, times) for times in running),
        )
        step = statistics.median([longer(times, *span) for times in running])
        at = requests * (context + 20.0)
        self.steps.append(Step(len(own), ahead, requests, at, step))

    async def _told(
        self, tokens: Sequence[int], new: int, times: list[float]
    ) -> list[float]:
        """Note in *times* when each token of an answer came."""
        async for piece in self._ask(tokens, new):
            times += [time.monotonic()] * len(piece.outputs[0].token_ids)
        return times

    async def _first(self, tokens: Sequence[int]) -> tuple[float, float]:
        """Return the seconds to compute a prompt, and to the first token."""
        begun = time.monotonic()
        async for piece in self._ask(tokens, 1):
            if piece.outputs[0].token_ids:
                waited = time.monotonic() - begun
                # By the engine's own clock, which on Linux is this one.
                said = piece.metrics
                return said.first_token_ts - said.scheduled_ts, waited
        raise RuntimeError("no token came")

    def _ask(self, tokens: Sequence[int], new: int) -> AsyncIterator[Any]:
        from vllm.sampling_params import RequestOutputKind

        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=new,
            ignore_eos=True,
            temperature=0.0,
            output_kind=RequestOutputKind.DELTA,
        )
        id = f"probe{next(self._count)}"
        stream: AsyncIterator[Any]
        stream = self.engine._llm.generate({"prompt_token_ids": tokens}, sampling, id)
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


def longer(times: Sequence[float], asked: float, came: float) -> float:
    """Return the one step between *asked* and *came* that was not like the others."""
    first = int(np.searchsorted(times, asked)) - 1
    last = min(int(np.searchsorted(times, came)) + 2, len(times) - 1)
    usual = (times[first] - times[4]) / (first - 4)
    return times[last] - times[first] - usual * (last - first - 1)


def intake(rests: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return seconds, and seconds a token, that fit *rests* best (Theil and Sen)."""
    tokens, seconds = np.array(rests, dtype=np.float64).T
    apart = np.subtract.outer(tokens, tokens)
    slopes = np.subtract.outer(seconds, seconds)[apart > 0] / apart[apart > 0]
    slope = max(float(np.median(slopes)), 0.0)
    return max(float(np.median(seconds - slope * tokens)), 0.0), slope
