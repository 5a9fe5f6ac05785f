"""One request as a model worker holds it, and how an engine is set up."""

from __future__ import annotations

import math

import attrs

from ..amounts import as_real, as_whole
from ..blocks import Prompt
from ..errors import InvalidRequest, shown
from ..hashing import Hashes, process_hasher, seed_of
from ..types import Request

# One token of a step is for a prompt, one at least for an answer.
_LEAST = {"step_tokens": 2, "report_tokens": 1, "cpu_blocks": 0}


@attrs.frozen(kw_only=True)
class EngineSettings:
    """How an engine schedules; the defaults are vLLM's on one Hopper GPU.

    Attributes:
        step_tokens: Most tokens a step computes, prompts and answers together.
        watermark: Part of the KV cache that a prompt must leave free.
        by_priority: Waiting requests go by `Request.priority`, as with vLLM's
            `scheduling_policy="priority"`; otherwise first come, first served.
        prefix_caching: Reuse blocks between requests.
        steps_ahead: Steps that are scheduled before the one under way has ended,
            0 or 1; who comes meanwhile joins after them.  vLLM's asynchronous
            scheduling, its default, has one.
        report_tokens: Generated tokens between two progress reports.
        cpu_blocks: Blocks of host memory that take what the GPU evicts.
        intake_s: Seconds between a request's dispatch and its place in the engine's
            queue, and between an answer and its client: nothing else waits for them.
        intake_s_per_token: As many more for each token of its prompt, cached ones
            too: they are sent, decoded and hashed.  A vLLM engine in one process
            with its router took 2.5 ms and 0.3 us on the host of an H200.
        intake_s_per_request: As many more for each request that the engine computes
            then: their tokens go through the same hands.
        cold_start_s: Seconds from the wish for a worker to its joining ready.

    >>> EngineSettings().step_tokens
    2048
    """

    step_tokens: int = 2048
    watermark: float = 0.0
    by_priority: bool = False
    prefix_caching: bool = True
    steps_ahead: int = 1
    report_tokens: int = 128
    cpu_blocks: int = 0
    intake_s: float = 0.0
    intake_s_per_token: float = 0.0
    intake_s_per_request: float = 0.0
    cold_start_s: float = 60.0

    def __attrs_post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = as_whole(given := getattr(self, name))
            if value is None or value < least:
                raise InvalidRequest(
                    f"{name} is {shown(given)}, must be a whole number, {least} or more"
                )
        if self.steps_ahead not in (0, 1):
            raise InvalidRequest(f"steps_ahead is {self.steps_ahead}, want 0 or 1")
        if not 0.0 <= self.watermark < 1.0:
            raise InvalidRequest(f"watermark is {self.watermark}, want [0, 1)")
        intake = "intake_s", "intake_s_per_token", "intake_s_per_request"
        for name in (*intake, "cold_start_s"):
            if not 0.0 <= as_real(getattr(self, name)) < math.inf:
                raise InvalidRequest(f"{name} is {getattr(self, name)!r}, no time")


@attrs.define(eq=False)
class Sequence:
    """A request inside a model worker.

    Attributes:
        request: It.
        answer: Prompt and answer, if their names are known.
        output_tokens: How long the answer gets here.
        names: Of the prompt's full blocks.
        order: Its place in line; 0 while it is on its way.
        missed: End of the step under way when it came; the one after that was
            scheduled too, if there was anything to do.
        remote: Its KV comes from another worker: the last token is all there
            is to compute.
        prefill_only: Another worker decodes it.
        given: Tokens of the answer that another worker generated before.
        length: Tokens whose KV a prefill has to provide.
        computed: Of them, how many there are.
        generated: Tokens of the answer when it last joined or left the batch.
        base: While decoding, KV tokens less the worker's step count.
        end_step: While decoding, the step that ends it.
        cached: Prompt tokens it found in the cache at its first admission.
        loaded: Prompt tokens that come from host memory at its admission.
        owned: Names it holds, head first.
        fresh: Those of them that it computes itself and has not reported.
        nameless: Blocks it holds without a name.
        reported: Generated tokens that were reported.
        gone: Aborted or ended; whoever still sees it lets it be.
        parked: Its prompt is computed and waits for its hand-over.
    """

    request: Request
    answer: Prompt | None
    output_tokens: int
    names: list[int]
    order: int = 0
    missed: float = -math.inf
    remote: bool = False
    prefill_only: bool = False
    given: int = 0
    length: int = 0
    computed: int = 0
    generated: int = 0
    base: int = 0
    end_step: int = 0
    cached: int = -1
    loaded: int = 0
    owned: list[int] = attrs.field(factory=list)
    fresh: list[int] = attrs.field(factory=list)
    nameless: int = 0
    reported: int = 0
    gone: bool = False
    parked: bool = False

    @property
    def blocks(self) -> int:
        """Blocks it holds."""
        return len(self.owned) + self.nameless

    @property
    def answers(self) -> bool:
        """Whether it generates here, behind the token that its prompt gives."""
        return not self.prefill_only and self.output_tokens - self.generated > 1

    def answer_names(self, block_tokens: int) -> Hashes | None:
        """Name the full blocks of prompt and answer, if that is known."""
        if self.answer is None:
            return None
        request, names = self.request, self.answer.hashes(block_tokens)
        if request.salt or request.lora:
            names = names + seed_of(request.salt, request.lora)
        if request.media:
            names = process_hasher().mark(names, block_tokens, request.media)
        return names
