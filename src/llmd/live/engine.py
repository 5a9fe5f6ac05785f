"""The seam to an inference engine: what `llmd.live` asks of one."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs

from ..errors import EngineError
from ..events import BlocksCleared, BlocksRemoved, BlocksStored, SignalsReported
from ..types import Request, RequestId, State, Worker, WorkerId

Report: TypeAlias = BlocksStored | BlocksRemoved | BlocksCleared | SignalsReported


@attrs.frozen(kw_only=True)
class Call:
    """One generation, as an engine is asked for it.

    Attributes:
        request: What scheduling knows of it; its `prompt.ids` are the prompt.
        sampling: Sampling parameters under their OpenAI names (`temperature`,
            `top_p`, `stop`, `seed`, `logprobs` ...), unknown ones refused.
        kv_transfer: Opaque hand-off of a P/D pair, from the prefill engine.
        prefill_only: Compute the prompt and keep its KV for another engine.
    """

    request: Request
    sampling: Mapping[str, Any] = attrs.field(factory=dict)
    kv_transfer: Mapping[str, Any] | None = None
    prefill_only: bool = False


@attrs.frozen(kw_only=True)
class Output:
    """A piece of an answer.

    Attributes:
        token_ids: New tokens since the last piece; empty if the engine hides them.
        text: New text since the last piece; empty without a tokenizer.
        finish_reason: `stop`, `length`, ... in the last piece, else None.
        cached_tokens: Prompt tokens found in the cache, by the engine's count;
            None until known.
        logprobs: As the engine gives them for the new tokens, or None.
        kv_transfer: What the decode engine needs, in a prefill's last piece.
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: str | None = None
    cached_tokens: int | None = None
    logprobs: Any = None
    kv_transfer: Mapping[str, Any] | None = None


@attrs.frozen
class Promise:
    """What hands over a prompt's KV that is not computed yet; opaque.

    Attributes:
        prefill: For the call that computes it, its `Call.kv_transfer`.
        decode: For the call that goes on from there, on another engine.
    """

    prefill: Mapping[str, Any]
    decode: Mapping[str, Any]


class Engine(abc.ABC):
    """One inference worker, whatever runs it.

    All methods are called on one event loop and must not block it.
    """

    @abc.abstractmethod
    async def start(
        self,
        worker: WorkerId,
        report: Callable[[Report], None],
        progress: Callable[[State], None],
    ) -> Worker:
        """Bring the engine up, warm it, and say what it can do.

        Args:
            worker: The id to report under.
            report: Takes what the engine tells, on the event loop, until
                `stop` returns.  Event times are the loop's clock.
            progress: Takes the states passed through on the way to ready.

        Raises:
            EngineError: It cannot start; nothing of it is left running.
        """

    @abc.abstractmethod
    def generate(self, call: Call) -> AsyncIterator[Output]:
        """Yield the answer in pieces.

        Closing the iterator early aborts the generation in the engine.

        Raises:
            InvalidRequest: The engine will not take these parameters.
            WorkerLost: The engine died.
            EngineError: It failed otherwise.
        """

    @abc.abstractmethod
    async def abort(self, request_id: RequestId) -> None:
        """Stop a generation; its iterator ends with finish reason `abort`."""

    @abc.abstractmethod
    async def stop(self) -> None:
        """End the engine and all it started; idempotent."""

    def promise(self, request: Request) -> Promise | None:
        """Return how another engine may wait for the KV of *request* already.

        None, the default: it is told only when the prompt has been computed.
        """
        return None

    @property
    def replaced(self) -> bool:
        """Whether what only this can serve waits for another when it dies."""
        return True

    async def died(self) -> str:
        """Return, when the engine dies without `stop`, what happened.

        Waits forever if it never does; the caller cancels.
        """
        return await asyncio.Future[str]()

    async def tokenize(self, text: str) -> list[int]:
        """Return the token ids of *text* by the engine's own tokenizer.

        Raises:
            EngineError: It has none.
        """
        raise EngineError(f"{type(self).__name__} has no tokenizer")

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation by the engine's chat template.

        Args:
            messages: As in the OpenAI API, text only.
            tools: As in the OpenAI API.
            template: Further variables of the template.

        Raises:
            InvalidRequest: The template refuses them.
            EngineError: The engine has no tokenizer.
        """
        raise EngineError(f"{type(self).__name__} has no chat template")
