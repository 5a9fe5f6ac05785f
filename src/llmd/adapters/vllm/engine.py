"""A vLLM engine of this process: its frontend here, its core in a child process."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ...amounts import as_real
from ...errors import EngineError, WorkerLost, shown
from ...live.engine import Call, Engine, Output, Promise, Report
from ...types import Request, RequestId, Role, State, Worker, WorkerId
from . import calls, sampling, stats
from .connector_config import layerwise, ours
from .connector_counts import TransferCounts
from .kv_events import KVEventDecoder
from .kv_stream import KVEndpoint, KVEventStream
from .launch import Launch, in_thread, processes, shut_down
from .reports import Gate, Throttle
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

    Raises:
        EngineError: A time is no number from 0 on, or a variable is no text.

    Attributes:
        counters: What the engine itself has counted since it was ready, under
            the names of vLLM's metrics without `vllm:` and `_total`.

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
        given = (names,) if isinstance(names, str) else tuple(names)
        self.names = given or (Path(self.model).name,)
        self.tokenizer: Tokenizer | None = None
        self.counters: Counter[str] = Counter()
        self._options = dict(options or {})
        self._loras = dict(loras or {})
        self._environment = dict(environment or {})
        for variable, value in self._environment.items():
            if not isinstance(variable, str) or not isinstance(value, str):
                raise EngineError(f"environment has {shown(variable)}={shown(value)}")
        times = {"start_timeout": start_timeout, "signals_every": signals_every}
        for name, time in times.items():
            if not as_real(time) >= 0:
                raise EngineError(f"{name} is {shown(time)}, must be a number >= 0")
        self._start_timeout = start_timeout
        self._signals_every = signals_every
        self._llm: Any = None
        self._cores: list[Any] = []
        self._scratch = ""
        self._stream: KVEventStream | None = None
        self._signals: Throttle | None = None
        self._watch: asyncio.Task[None] | None = None
        self._death: asyncio.Future[str] | None = None
        self._stopping = asyncio.Lock()
        self._start: asyncio.Task[Worker] | None = None
        self._end: Future[None] | None = None
        self._running: set[RequestId] = set()
        # What the last prompt was handed over with: it names this engine's address.
        self._handed: Mapping[str, Any] = {}

    async def start(
        self,
        worker: WorkerId,
        report: Callable[[Report], None],
        progress: Callable[[State], None],
    ) -> Worker:
        if self._death is not None:
            raise EngineError(f"engine of {self.model!r} was started before")
        loop = asyncio.get_running_loop()
        self._death = loop.create_future()
        begun = self._begin(worker, report, progress)
        self._start = loop.create_task(begun, name="llmd-vllm-start")
        try:
            return await self._start
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            why = f"engine of {self.model!r} was stopped while it started"
            raise EngineError(why) from None

    async def _begin(
        self,
        worker: WorkerId,
        report: Callable[[Report], None],
        progress: Callable[[State], None],
    ) -> Worker:
        try:
            progress(State.LOADING)
            gate = Gate(report)
            await self._load(worker, gate)
            progress(State.WARMING)
            async with asyncio.timeout(_PROBE_TIMEOUT):
                await _warm(self._llm, gate)
            gate.opened = True
            self.counters.clear()
            return self._described(worker)
        except BaseException as error:
            await self._close()
            if isinstance(error, TimeoutError):
                raise EngineError(f"vLLM did not get {self.model!r} ready") from error
            raise

    async def generate(self, call: Call) -> AsyncIterator[Output]:
        llm, request = self._alive(), call.request
        config = llm.vllm_config
        ids = calls.prompt_ids(call, config.model_config.max_model_len)
        salt = {"cache_salt": request.salt} if request.salt else {}
        ranked = config.scheduler_config.policy == "priority"
        stream = llm.generate(
            {"prompt_token_ids": ids, **salt},
            sampling.to_vllm(call, detokenize=self.tokenizer is not None),
            request.id,
            lora_request=calls.lora_request(request.lora, self._loras),
            priority=request.priority if ranked else 0,
        )
        self._running.add(request.id)
        try:
            async with contextlib.aclosing(stream):
                async for piece in stream:
                    output = calls.output(piece)
                    if output.kv_transfer is not None:
                        self._handed = output.kv_transfer
                    yield output
        except Exception as error:
            raise calls.translated(error, self._death_told()) from error
        finally:
            self._running.discard(request.id)

    def promise(self, request: Request) -> Promise | None:
        """Return a promise from the second hand-off on, where layers go one by one."""
        if not layerwise(self._options.get("kv_transfer_config")):
            return None
        from .connector_plan import promise

        return promise(request.id, self._handed)

    async def abort(self, request_id: RequestId) -> None:
        if self._llm is not None and request_id in self._running:
            await self._llm.abort(request_id)

    async def stop(self) -> None:
        start = self._start
        if start is not None and not start.done():
            start.cancel()
            await asyncio.wait([start])
        await self._close()

    async def _close(self) -> None:
        async with self._stopping:
            llm, self._llm = self._llm, None
            try:
                if self._watch is not None:
                    self._watch.cancel()
                    self._watch = None
                if self._signals is not None:
                    self._signals.close()
                if self._stream is not None:
                    await self._stream.close()
                if llm is not None:
                    await self._end_streams(llm)
            finally:
                # Whoever waits here may be cancelled; that may cost no engine.
                if llm is not None:
                    if handler := getattr(llm, "output_handler", None):
                        # Left alone, it logs the end of its engine as an error.
                        handler.cancel()
                    self._end = in_thread(shut_down, llm, self._cores)
                    del llm
                if self._scratch:
                    shutil.rmtree(self._scratch, ignore_errors=True)
            if self._end is not None:
                await asyncio.wrap_future(self._end)
                # What vLLM asked the loop to close, it closes now.
                await asyncio.sleep(0)

    async def died(self) -> str:
        if self._death is None:
            raise EngineError(f"engine of {self.model!r} is not started")
        return await asyncio.shield(self._death)

    async def tokenize(self, text: str) -> list[int]:
        return await self._tokenizer.encoded(text)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> list[int]:
        return await self._tokenizer.prompted(messages, tools=tools, template=template)

    async def pause(self) -> None:
        """Freeze all requests where they are, keeping their KV."""
        await self._alive().pause_generation(mode="keep", clear_cache=False)

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self._alive().resume_generation()

    async def sleep(self) -> None:
        """Move weights to host memory and drop KV: level 1 of vLLM's sleep mode.

        Needs the option `enable_sleep_mode`, and a GPU.  Requests that `pause`
        froze survive: vLLM computes their KV again once it is awake.
        """
        llm = self._alive()
        if "mode" in inspect.signature(llm.sleep).parameters:
            await llm.sleep(level=1, mode="keep")
        else:
            await llm.pause_generation(mode="keep", clear_cache=True)
            await llm.sleep(level=1)

    async def wake(self) -> None:
        """Take the memory back after `sleep`, and stay paused."""
        llm = self._alive()
        await llm.wake_up()
        # Waking resumes; whose turn it is is not for the engine to say.
        await llm.pause_generation(mode="keep", clear_cache=False)

    async def transfer_counts(self) -> list[Mapping[str, int]]:
        """Return what llmd's connector holds, of each rank; see `TransferCounts`.

        Raises:
            EngineError: The engine has another connector, or none.
        """
        if not ours(self._options.get("kv_transfer_config")):
            raise EngineError(f"engine of {self.model!r} has not llmd's connector")
        counts: list[Mapping[str, int]]
        counts = await self._alive().collective_rpc("transfer_counts")
        return counts

    async def _load(self, worker: WorkerId, report: Callable[[Report], None]) -> None:
        loop = asyncio.get_running_loop()
        self._scratch = tempfile.mkdtemp(prefix="llmd-")
        endpoint = KVEndpoint(
            f"ipc://{self._scratch}/events", f"ipc://{self._scratch}/replay"
        )
        self._signals = Throttle(worker, report, self._signals_every)
        launch = Launch(
            self.model,
            self.names,
            self._all_options(),
            self._environment,
            endpoint,
            functools.partial(stats.listener, self._signals, self.counters),
        )
        try:
            async with asyncio.timeout(self._start_timeout):
                await asyncio.wrap_future(launch.begin())
        except BaseException:
            launch.give_up()
            raise
        finally:
            self._llm = llm = launch.take()
            self._cores = [] if llm is None else processes(llm)
        self._watch = loop.create_task(self._watch_cores(llm), name="llmd-vllm-watch")
        self._stream = KVEventStream(KVEventDecoder(worker), report, endpoint)
        self._stream.start()
        if not llm.vllm_config.model_config.skip_tokenizer_init:
            self.tokenizer = await Tokenizer.of(llm)

    def _all_options(self) -> dict[str, Any]:
        """Return the user's options, and what they need beside them."""
        options = dict(self._options)
        if ours(options.get("kv_transfer_config")):
            options.setdefault("worker_extension_cls", TransferCounts.NAME)
        if self._loras:
            options.setdefault("enable_lora", True)
            # All at once in memory: vLLM would swap them, request by request.
            most = max(options.get("max_loras", 1), len(self._loras))
            options["max_loras"] = most
        return options

    async def _end_streams(self, llm: Any) -> None:
        """End what still runs with reason `abort`: vLLM would leave it waiting."""
        if self._running and not llm.errored:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(1.0):
                    await llm.abort([*self._running])
            await asyncio.sleep(0)

    def _death_told(self) -> str | None:
        if self._death is not None and self._death.done():
            return self._death.result()
        return None

    def _described(self, worker: WorkerId) -> Worker:
        config = self._llm.vllm_config
        return Worker(
            id=worker,
            models=frozenset(self.names),
            loras=frozenset(self._loras),
            role=_role(config.kv_transfer_config),
            # One of them is the null block, which holds nothing.
            kv_blocks=config.cache_config.num_gpu_blocks - 1,
            block_tokens=config.cache_config.block_size,
            max_model_tokens=config.model_config.max_model_len,
            max_running=config.scheduler_config.max_num_seqs,
        )

    def _alive(self) -> Any:
        if death := self._death_told():
            raise WorkerLost(death)
        if self._llm is None:
            raise EngineError(f"engine of {self.model!r} is not running")
        return self._llm

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise EngineError(f"engine of {self.model!r} has no tokenizer")
        return self.tokenizer

    async def _watch_cores(self, llm: Any) -> None:
        """Note the death of the engine; vLLM has nothing that could be awaited."""
        while not llm.errored:  # noqa: ASYNC110
            await asyncio.sleep(_WATCH_SECONDS)
        codes = [core.exitcode for core in self._cores]
        if self._death is not None and not self._death.done():
            self._death.set_result(f"the engine core exited with {codes}")


def _role(transfer: Any) -> Role:
    """Return what an engine may be asked to do, by its KV connector."""
    roles = {"kv_producer": Role.PREFILL, "kv_consumer": Role.DECODE}
    return roles.get(getattr(transfer, "kv_role", None) or "", Role.BOTH)


async def _warm(llm: Any, gate: Gate) -> None:
    """Run what the first requests would otherwise pay for; leave no trace."""
    config = llm.vllm_config
    longest = min(
        _PROBE_TOKENS,
        config.model_config.max_model_len - 2,
        config.scheduler_config.max_num_batched_tokens,
    )
    await _probe(llm, longest)
    if config.cache_config.enable_prefix_caching:
        await llm.reset_prefix_cache()
        # The engine tells that it dropped the probe only with another step.
        await _probe(llm, 1)
        await gate.cleared.wait()


async def _probe(llm: Any, tokens: int) -> None:
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=1,
        ignore_eos=True,
        detokenize=False,
        # What ranks logprobs is compiled on first use, 5-15 s on a CPU, and
        # every other request would wait for it.
        logprobs=1,
    )
    prompt = {"prompt_token_ids": [7] * tokens}
    async for _ in llm.generate(prompt, params, f"llmd-probe-{tokens}"):
        pass
