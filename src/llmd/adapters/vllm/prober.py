"""Asks an engine for prompts and batches of all sizes, and notes what they take."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any, TypeVar

import attrs
import numpy as np

from ...live import Server
from ...machines.fit import Step
from ...sim.calibration import Probed
from ...types import Request, Worker
from .probe_sizes import Sizes
from .probe_times import First, Launch, launch, longer, usual

_T = TypeVar("_T")
_JOINING = 3
"""Prompts, one after the other, whose steps are told apart by their sum only."""
_LOOKED_AT = 2
"""Prompts, one after the other, at each look at the host."""
_WEIGHT = 4
"""Steps that many were averaged for count as so many."""
_HOT = 24
"""Full steps, one after the other: a second or two."""


@attrs.define
class Prober:
    """Asks one engine for prompts and batches of all sizes, one after the other.

    Where a client shares cores with engines, what it does for a token is part of
    what users wait for: answers are streamed through the server then, whose router
    is `Asked`, as they are under load.  Where it does not, that would only make
    stamps of large batches late.

    Attributes:
        ahead: It schedules a step while the one before runs.
        steps: As of `Probed`, as the next three.
    """

    server: Server
    worker: str
    sizes: Sizes
    ahead: bool
    steps: list[Step] = attrs.field(factory=list)
    rests: list[tuple[int, float]] = attrs.field(factory=list)
    launches: list[tuple[int, float]] = attrs.field(factory=list)
    late: list[tuple[int, float]] = attrs.field(factory=list)
    _count: Any = attrs.field(factory=itertools.count, init=False)
    _launches: list[Launch] = attrs.field(factory=list, init=False)
    _drawn_heads: list[list[int]] = attrs.field(factory=list, init=False)
    _rng: Any = attrs.field(factory=lambda: np.random.default_rng(5), init=False)

    async def run(self) -> None:
        """Ask, and add to what was found before."""
        sizes, steps, rests = self.sizes, len(self.steps), len(self.rests)
        await self.prefill(max(sizes.prompts), [])
        await self.decode(max(sizes.batches), 32)
        del self.steps[steps:], self.rests[rests:]  # that was to warm up
        await self._look_at_host()
        for context in sizes.contexts:
            (head,) = await self._heads(1, context)
            for tokens in sizes.prompts:
                await self.prefill(tokens, head)
        await self._look_at_host()
        for context in (32, *sizes.contexts[1:]):
            for requests in sizes.batches:
                if requests * context <= sizes.cached:
                    await self.decode(requests, context)
        if beside := sizes.beside:
            await self._all_joined(beside)
        await self._look_at_host()
        self._add_launches()
        if sizes.shared:
            await self._chunks(min(4, (sizes.longest - 1) // sizes.step_tokens))

    async def _all_joined(self, beside: tuple[int, ...]) -> None:
        """Let prompts of all lengths join batches of all sizes."""
        sizes, context = self.sizes, self.sizes.contexts[1]
        some = sizes.joining, beside[-1::-2][:2], (False, True)
        for tokens, requests, cached in itertools.product(*some):
            await self._mixed(tokens, requests, context, cached=cached)
        if sizes.fills and not sizes.shared:
            await self._hot(beside[-2:][0])

    async def _look_at_host(self) -> None:
        """Time what a host does for steps and tokens, where it does little else.

        Others may use it too and make it slow for seconds, which the few of these
        would all be in: so there are several looks, far apart.
        """
        sizes = self.sizes
        if sizes.shared:
            return
        for requests in sizes.beside[1:]:
            if self.ahead:
                await self._launched(min(sizes.prompts), requests, sizes.contexts[1])
            await self._crowded(min(sizes.prompts), requests)

    def found(self, worker: Worker) -> Probed:
        """Return what was found of *worker*."""
        return Probed(
            worker=worker,
            steps=tuple(self.steps),
            rests=tuple(self.rests),
            launches=tuple(self.launches),
            late=tuple(self.late),
        )

    async def prefill(self, tokens: int, head: list[int]) -> None:
        """Ask an idle engine twice, behind a *head* that is cached."""
        for _ in range(2):
            own = self._drawn(tokens)
            if tokens > self.sizes.step_tokens // 4:
                await asyncio.sleep(self.sizes.rest_s)
            first = await self._first([*head, *own])
            self.steps.append(Step(len(own), len(head), 0, 0, first.computed_s))
            rest = first.waited_s - first.computed_s
            self.rests.append((len(head) + len(own), rest))

    async def _heads(self, requests: int, context: int) -> list[list[int]]:
        """Return that many heads of prompts, all different, that are cached.

        What several requests share is read from nearby: as if there were less.
        """
        while len(self._drawn_heads) < requests:
            self._drawn_heads.append(self._tokens(max(self.sizes.contexts)))
        heads = [head[:context] for head in self._drawn_heads[:requests]]
        if context:
            await together(self._first([*head, 7]) for head in heads)
        return heads

    async def _chunks(self, count: int) -> None:
        """Time full steps of one prompt: the next is made ready during each."""
        size = self.sizes.step_tokens
        if count < 2:
            return
        last = [await self._first(self._tokens(size)) for _ in range(3)]
        long = [await self._first(self._tokens(size * count)) for _ in range(3)]
        seconds = statistics.median(first.computed_s for first in long)
        seconds -= statistics.median(first.computed_s for first in last)
        self.steps.append(Step(size, size * count / 2, 0, 0, seconds / (count - 1)))

    async def _hot(self, requests: int) -> None:
        """Time full steps, a prompt beside *requests* each, of a GPU without rest."""
        context = self.sizes.contexts[1]
        size = self.sizes.step_tokens - requests
        prompts = [self._tokens(size) for _ in range(_HOT)]
        heads = await self._heads(requests, context)
        found, _ = await self._joined(heads, [prompts], self._told, 0.0)
        at = sorted(first.stamp for first in found)[_HOT // 3 :]
        seconds = statistics.median(np.diff(at).tolist())
        tokens = requests * (context + self.sizes.answer // 2 + _HOT / 2)
        self.steps += [Step(size, 0, requests, tokens, seconds, True, 1.0)] * _WEIGHT

    async def decode(self, requests: int, context: int) -> None:
        """Let *requests* generate together and take the gaps while all do."""
        new = self.sizes.answer
        heads = await self._heads(requests, context)
        arrivals = await together(
            self._told([*head, *self._tokens(1)], new, []) for head in heads
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
        count = _JOINING if self.ahead else 1
        # In one step with those that generate.
        tokens = min(tokens, self.sizes.step_tokens - requests)
        drawn = [self._drawn(tokens) for _ in range(count)]
        heads = await self._heads(requests, context)
        ahead = heads[0] if cached else []
        joined = [[[*ahead, *own]] for own in drawn]
        rest_s = self.sizes.rest_s
        found, running = await self._joined(heads, joined, self._told, rest_s)
        step = statistics.median(first.computed_s for first in found)
        if self.ahead:
            # With rests between them each can be told apart.
            spans = [(first.asked, first.came, 1) for first in found]
            if not rest_s:
                spans = [(found[0].asked, found[-1].came, count)]
            took = [longer(times, *span) for times in running for span in spans]
            step = statistics.median(took)
        at = requests * (context + self.sizes.answer // 2 + 1.0)
        size = statistics.mean(map(len, drawn))
        ready = self.ahead and not self.sizes.shared
        self.steps.append(Step(size, len(ahead), requests, at, step, ready))

    async def _launched(self, tokens: int, requests: int, context: int) -> None:
        """Let short prompts join *requests*, which wait for the host to launch them.

        The longest gap is that launch; while the prompt is computed the next step
        is launched, which has none: the gap behind it.
        """
        heads = await self._heads(requests, context)
        for head in ([], heads[0]):
            drawn = [self._tokens(tokens) for _ in range(_LOOKED_AT)]
            prompts = [[[*head, *own]] for own in drawn]
            found, running = await self._joined(heads, prompts, self._told, 0.05)
            gaps = [
                launch(times, first.asked, first.came)
                for first in found
                for times in running[:8]
            ]
            mean = map(statistics.mean, zip(*gaps, strict=True))
            self._launches.append(Launch(requests, tokens, len(head), *mean))

    def _add_launches(self) -> None:
        found, short = usual(self._launches), defaultdict(list)
        for one in found:
            step = Step(one.tokens, one.cached, 0, 0, one.prompt_s)
            self.steps += [step] * _WEIGHT
            short[one.requests].append(one.next_s)
        self.launches += [(size, statistics.mean(s)) for size, s in short.items()]
        self._launches.clear()

    async def _crowded(self, tokens: int, requests: int) -> None:
        """See how late a first token is that comes with those of *requests*.

        The process that hands tokens out has to do so for all of them.
        """
        drawn = [[self._drawn(tokens)] for _ in range(_LOOKED_AT)]
        heads = await self._heads(requests, 32)
        found, _ = await self._joined(heads, drawn, self._told_served, 0.05)
        self.late += [(requests, first.late_s) for first in found]

    async def _joined(
        self,
        heads: list[list[int]],
        crowds: list[list[list[int]]],
        told: Any,
        rest_s: float,
    ) -> tuple[list[First], list[list[float]]]:
        """Let *crowds* of prompts, one after the other, join others with *heads*.

        Returns:
            What came of each prompt, and when the tokens of the others came.
        """
        sizes, over = self.sizes, asyncio.Event()
        running: list[list[float]] = [[] for _ in heads]
        new = (2 if sizes.shared else 40) * sizes.answer
        new = min(new, sizes.longest - max(map(len, heads)) - 1)

        async def joins() -> list[First]:
            while min(map(len, running)) < sizes.answer // 2:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            found: list[First] = []
            for crowd in crowds:
                await asyncio.sleep(rest_s)
                found += await together(map(self._first, crowd))
            if not sizes.shared:
                await asyncio.sleep(0.05)
                over.set()
            return found

        async with asyncio.TaskGroup() as group:
            found = group.create_task(joins())
            for head, times in zip(heads, running, strict=True):
                group.create_task(told([*head, *self._tokens(1)], new, times, over))
        return found.result(), running

    async def _told(
        self,
        tokens: list[int],
        new: int,
        times: list[float],
        over: asyncio.Event | None = None,
    ) -> list[float]:
        """Note in *times* when each token of an answer came, until it is *over*."""
        stream = self._served if self.sizes.shared else self._direct
        return await _noted(stream(tokens, new), times, over)

    async def _told_served(
        self, tokens: list[int], new: int, times: list[float], over: asyncio.Event
    ) -> list[float]:
        return await _noted(self._served(tokens, new), times, over)

    async def _served(self, tokens: list[int], new: int) -> AsyncIterator[int]:
        request = Request(
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

    async def _first(self, tokens: list[int]) -> First:
        """Ask for one token; the engine's stamps only vLLM's own client is told."""
        begun = time.monotonic()
        async for piece in self._ask(tokens, 1):
            if piece.outputs[0].token_ids:
                came, said = time.monotonic(), piece.metrics
                return First(begun, said.scheduled_ts, said.first_token_ts, came)
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
        tokens = self._rng.integers(10, self.sizes.vocabulary - 10, count).tolist()
        return tokens


async def _noted(
    pieces: AsyncIterator[int], times: list[float], over: asyncio.Event | None
) -> list[float]:
    async with contextlib.aclosing(pieces) as stream:  # type: ignore[type-var]
        async for count in stream:
            times += [time.monotonic()] * count
            if over is not None and over.is_set():
                break
    return times


async def together(calls: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Await all at once; if one fails, none goes on."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(call) for call in calls]
    return [task.result() for task in tasks]
