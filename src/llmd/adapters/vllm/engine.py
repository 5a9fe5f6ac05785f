"""A vLLM engine of this process: its frontend here, its core in a child process."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import (
    EngineError,
    InvalidRequest,
    PromptTooLong,
    UnknownAdapter,
    WorkerLost,
)
from ...events import BlocksCleared, SignalsReported
from ...live.engine import Call, Engine, Output, Report
from ...types import RequestId, Signals, State, Worker, WorkerId
from . import sampling
from .kv_events import KVEventDecoder
from .kv_stream import KVEndpoint, KVEventStream
from .launch import launch, processes, shut_down
from .tokens import Tokenizer

_PROBE_TOKENS = 512
_PROBE_TIMEOUT = 120.0
_WATCH_SECONDS = 0.1


class VllmEngine(Engine):
    """Runs vLLM's `AsyncLLM` on one model.

    Args:
        model: Directory or hub name.
        names: Model names it answers to; the last part of *model* if empty.
        options: Of vLLM's `AsyncEngineArgs`, by name; they override the few
            that `llmd.adapters.vllm.launch` chooses (on a CPU, those that make
            it start in seconds).
        loras: Name -> directory of each LoRA adapter.
        environment: Variables for the engine's own processes, such as
            `VLLM_NIXL_SIDE_CHANNEL_PORT`.
        start_timeout: Seconds to load the model.
        signals_every: Seconds between two reports of signals, at least.

    >>> VllmEngine("models/tiny", options={"max_model_len": 2048}).names
    ('tiny',)
    """

    def __init__(
        self,
        model: str | Path,
        *,
        names: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
        loras: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        start_timeout: float = 900.0,
        signals_every: float = 0.05,
    ) -> None:
        self.model = str(model)
        self.names = tuple(names) or (Path(self.model).name,)
        self.tokenizer: Tokenizer | None = None
        self._options = dict(options or {})
        self._loras = dict(loras or {})
        self._environment = dict(environment or {})
        self._start_timeout = start_timeout
        self._signals_every = signals_every
        self._llm: Any = None
        self._cores: list[Any] = []
        self._scratch = ""
        self._stream: KVEventStream | None = None
        self._signals: _Throttle | None = None
        self._watch: asyncio.Task[None] | None = None
        self._death: asyncio.Future[str] | None = None
        self._running: set[RequestId] = set()
        self._max_model_tokens = 0

    async def start(
        self,
        worker: WorkerId,
        report: Callable[[Report], None],
        progress: Callable[[State], None],
    ) -> Worker:
        if self._death is not None:
            raise EngineError(f"engine of {self.model!r} was started before")
        self._death = asyncio.get_running_loop().create_future()
        try:
            progress(State.LOADING)
            gate = _Gate(report)
            await self._load(worker, gate)
            progress(State.WARMING)
            async with asyncio.timeout(_PROBE_TIMEOUT):
                await self._warm(gate)
            gate.opened = True
            return self._describe(worker)
        except BaseException as error:
            await self.stop()
            if isinstance(error, TimeoutError):
                raise EngineError(f"vLLM did not get {self.model!r} ready") from error
            raise

    async def generate(self, call: Call) -> AsyncIterator[Output]:
        llm = self._alive()
        request = call.request
        prompt = self._prompt(call)
        params = sampling.to_vllm(call, detokenize=self.tokenizer is not None)
        stream = llm.generate(
            prompt,
            params,
            request.id,
            lora_request=self._lora(request.lora),
            priority=request.priority if self._ranked else 0,
        )
        self._running.add(request.id)
        try:
            async with contextlib.aclosing(stream):
                async for piece in stream:
                    yield _output(piece)
        except EngineError:
            raise
        except Exception as error:
            raise self._translated(error) from error
        finally:
            self._running.discard(request.id)

    async def abort(self, request_id: RequestId) -> None:
        if self._llm is not None and request_id in self._running:
            await self._llm.abort(request_id)

    async def stop(self) -> None:
        llm, self._llm = self._llm, None
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
        if self._signals is not None:
            self._signals.close()
        if self._stream is not None:
            await self._stream.close()
        if llm is not None:
            if self._running and not llm.errored:
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(1.0):
                        await llm.abort([*self._running])
                # Streams end with reason `abort` before their engine goes.
                await asyncio.sleep(0)
            await asyncio.to_thread(shut_down, llm, self._cores)
            del llm
            # What vLLM asked the loop to close, it closes now.
            await asyncio.sleep(0)
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    async def died(self) -> str:
        if self._death is None:
            raise EngineError(f"engine of {self.model!r} is not started")
        return await asyncio.shield(self._death)

    async def tokenize(self, text: str) -> list[int]:
        return await asyncio.to_thread(self._tokenizer.encode, text)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> list[int]:
        return await asyncio.to_thread(
            self._tokenizer.chat, messages, tools=tools, template=template
        )

    async def pause(self) -> None:
        """Freeze all requests where they are, keeping their KV."""
        await self._alive().pause_generation(mode="keep", clear_cache=False)

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self._alive().resume_generation()

    async def _load(self, worker: WorkerId, report: Callable[[Report], None]) -> None:
        loop = asyncio.get_running_loop()
        self._scratch = tempfile.mkdtemp(prefix="llmd-")
        endpoint = KVEndpoint(
            f"ipc://{self._scratch}/events", f"ipc://{self._scratch}/replay"
        )
        self._signals = _Throttle(worker, report, self._signals_every)
        options = dict(self._options)
        if self._loras:
            options.setdefault("enable_lora", True)
            options.setdefault("max_loras", len(self._loras))
        loading = loop.run_in_executor(
            None,
            launch,
            self.model,
            self.names,
            options,
            self._environment,
            endpoint,
            self._signals,
        )
        try:
            async with asyncio.timeout(self._start_timeout):
                llm = await asyncio.shield(loading)
        except BaseException:
            # The thread cannot be stopped; what it makes is ended when it comes.
            loading.add_done_callback(_discard)
            raise
        self._llm = llm
        self._cores = processes(llm)
        self._watch = loop.create_task(self._watch_cores(llm), name="llmd-vllm-watch")
        self._stream = KVEventStream(KVEventDecoder(worker), report, endpoint)
        self._stream.start()
        if not llm.vllm_config.model_config.skip_tokenizer_init:
            self.tokenizer = await Tokenizer.of(llm)

    async def _warm(self, gate: _Gate) -> None:
        """Run what the first requests would otherwise pay for; leave no trace."""
        config = self._llm.vllm_config
        self._max_model_tokens = config.model_config.max_model_len
        longest = min(
            _PROBE_TOKENS,
            self._max_model_tokens - 2,
            config.scheduler_config.max_num_batched_tokens,
        )
        await self._probe(1)
        await self._probe(longest)
        if config.cache_config.enable_prefix_caching:
            await self._llm.reset_prefix_cache()
            # The engine tells that it dropped the probes only with another step.
            await self._probe(1)
            await gate.cleared.wait()

    async def _probe(self, tokens: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False
        )
        prompt = {"prompt_token_ids": [7] * tokens}
        async for _ in self._llm.generate(prompt, params, f"llmd-probe-{tokens}"):
            pass

    def _describe(self, worker: WorkerId) -> Worker:
        config = self._llm.vllm_config
        return Worker(
            id=worker,
            models=frozenset(self.names),
            loras=frozenset(self._loras),
            kv_blocks=config.cache_config.num_gpu_blocks,
            block_tokens=config.cache_config.block_size,
            max_model_tokens=self._max_model_tokens,
            max_running=config.scheduler_config.max_num_seqs,
        )

    def _alive(self) -> Any:
        if self._death is not None and self._death.done():
            raise WorkerLost(self._death.result())
        if self._llm is None:
            raise EngineError(f"engine of {self.model!r} is not running")
        return self._llm

    def _prompt(self, call: Call) -> dict[str, Any]:
        request = call.request
        if request.prompt.ids is None:
            raise InvalidRequest(f"{request.id!r} has a prompt without tokens")
        new = 1 if call.prefill_only else request.max_new_tokens or 1
        if request.prompt_tokens + new > self._max_model_tokens:
            raise PromptTooLong(
                f"{request.id!r}: {request.prompt_tokens} prompt tokens and {new} new"
                f" ones are more than {self._max_model_tokens}"
            )
        prompt: dict[str, Any] = {"prompt_token_ids": request.prompt.ids.tolist()}
        if request.salt:
            prompt["cache_salt"] = request.salt
        return prompt

    def _lora(self, name: str) -> Any:
        if not name:
            return None
        if name not in self._loras:
            raise UnknownAdapter(f"no adapter {name!r}, only {sorted(self._loras)}")
        from vllm.lora.request import LoRARequest

        number = [*self._loras].index(name) + 1
        return LoRARequest(name, number, self._loras[name])

    @property
    def _ranked(self) -> bool:
        return bool(self._llm.vllm_config.scheduler_config.policy == "priority")

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise EngineError(f"engine of {self.model!r} has no tokenizer")
        return self.tokenizer

    def _translated(self, error: Exception) -> Exception:
        from vllm.v1.engine.exceptions import EngineDeadError

        if isinstance(error, EngineDeadError) or self._death_noted():
            return WorkerLost(f"engine of {self.model!r} died: {error}")
        if isinstance(error, sampling.refusals()):
            return InvalidRequest(str(error))
        return EngineError(f"{type(error).__name__}: {error}")

    def _death_noted(self) -> bool:
        return self._death is not None and self._death.done()

    async def _watch_cores(self, llm: Any) -> None:
        """Note the death of the engine, which vLLM tells nobody without a request."""
        while not llm.errored:
            await asyncio.sleep(_WATCH_SECONDS)
        codes = [core.exitcode for core in self._cores]
        if self._death is not None and not self._death.done():
            self._death.set_result(f"the engine core exited with {codes}")


class _Gate:
    """Keeps the probes' reports from the cluster."""

    def __init__(self, report: Callable[[Report], None]) -> None:
        self.opened = False
        self.cleared = asyncio.Event()
        self._report = report

    def __call__(self, report: Report) -> None:
        if self.opened:
            self._report(report)
        elif isinstance(report, BlocksCleared):
            self.cleared.set()


class _Throttle:
    """Reports the newest signals, at most once in *every* seconds.

    The last ones before a silence are reported too, when their time comes.
    """

    def __init__(
        self, worker: WorkerId, report: Callable[[Report], None], every: float
    ) -> None:
        self._worker = worker
        self._report = report
        self._every = every
        self._loop = asyncio.get_running_loop()
        self._next = 0.0
        self._latest: tuple[Signals, float] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self, signals: Signals) -> None:
        now = self._loop.time()
        self._latest = signals, now
        if self._timer is None:
            self._timer = self._loop.call_at(max(now, self._next), self._tell)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _tell(self) -> None:
        self._timer = None
        now = self._loop.time()
        self._next = now + self._every
        if self._latest is not None:
            signals, measured_at = self._latest
            self._report(SignalsReported(now, self._worker, signals, measured_at))


def _discard(loading: asyncio.Future[Any]) -> None:
    if not loading.cancelled() and loading.exception() is None:
        llm = loading.result()
        cores = processes(llm)
        asyncio.get_running_loop().run_in_executor(None, shut_down, llm, cores)


def _output(piece: Any) -> Output:
    (answer,) = piece.outputs
    if answer.finish_reason == "error":
        raise EngineError(f"vLLM could not finish {piece.request_id!r}")
    return Output(
        token_ids=tuple(answer.token_ids),
        text=answer.text,
        finish_reason=answer.finish_reason,
        cached_tokens=piece.num_cached_tokens,
        logprobs=answer.logprobs,
        kv_transfer=piece.kv_transfer_params if piece.finished else None,
    )
