"""Start an `AsyncLLM`: all that differs between platforms and releases is here.

Environment variables are set only while an engine starts, and restored then:

    VLLM_NO_USAGE_STATS=1             if not set: no telemetry from a library
    VLLM_ENABLE_V1_MULTIPROCESSING=0  CPU: or vLLM replaces the "uni" executor;
                                      the engine core stays its own process
    OMP_NUM_THREADS=1                 CPU, if not set: 4100 tokens/s instead of
                                      1000 on 2 cores
    VLLM_WORKER_MULTIPROC_METHOD=fork CPU: 2-4 s instead of 19, as the child
                                      need not import vLLM again; never with a
                                      GPU, whose context does not survive a fork

Measured with vLLM 0.32.0 on 2 cores; 0.26 takes the same options.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import attrs

from ...errors import EngineError
from .connector_config import check_side_channel
from .kv_stream import KVEndpoint

_CPU_OPTIONS: Mapping[str, Any] = {
    "dtype": "float32",
    "block_size": 32,
    "max_num_seqs": 16,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "distributed_executor_backend": "uni",
}
# Engines of one process start one after another: the environment is shared.
_starting = threading.Lock()
_CORE = "EngineCore"
"""What vLLM calls the processes of its cores, a rank behind it or not."""
_LOOK_S = 0.1


@attrs.define(eq=False, repr=False)  # the environment has secrets
class Launch:
    """The start of one `AsyncLLM`, in a thread of its own, that may be given up.

    Attributes:
        model: Directory or hub name.
        names: It is served as; the first one is vLLM's.
        options: Of `AsyncEngineArgs`; they override what is chosen here.
        environment: Set while it starts, for its processes to inherit.
        events: Where it shall publish KV events.
        listener: Makes vLLM's stat logger factory, here, as it imports vLLM.
    """

    model: str
    names: tuple[str, ...]
    options: Mapping[str, Any]
    environment: Mapping[str, str]
    events: KVEndpoint
    listener: Callable[[], Callable[..., Any]]
    _given_up: threading.Event = attrs.field(factory=threading.Event, init=False)
    _taking: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    # Not the thread's result, nor in any frame of its: vLLM keeps those, and
    # would have it collected at exit, too late for its own clean-up.
    _made: Any = attrs.field(default=None, init=False)

    def begin(self) -> Future[None]:
        """Start it; the future ends in `EngineError` if that fails."""
        return in_thread(self._run)

    def give_up(self) -> None:
        """Kill what was started; an engine that is made all the same is ended."""
        self._given_up.set()

    def take(self) -> Any:
        """Return the engine, once; None if there is none."""
        with self._taking:
            made, self._made = self._made, None
        return made

    def _run(self) -> None:
        with _turn(self._given_up), _killed_when(self._given_up):
            try:
                self._made = self._launch()
            except EngineError:
                raise
            except Exception as error:
                # Whoever keeps the error would keep half an engine in its frames.
                traceback.clear_frames(error.__traceback__)
                what = f"vLLM did not start {self.model!r}: {error}"
                raise EngineError(what) from error
        # Whoever gave up takes it, or has come too early for that.
        if self._given_up.is_set() and (late := self.take()) is not None:
            shut_down(late, processes(late))

    def _launch(self) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        cpu = current_platform.is_cpu()
        chosen = self._chosen(cpu)
        variables = {
            "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
            **self.environment,
        }
        uni = cpu and chosen["distributed_executor_backend"] == "uni"
        if uni:
            variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            variables.setdefault(
                "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1")
            )
        with _environment(variables):
            check_side_channel(chosen.get("kv_transfer_config"), os.environ)
            config = AsyncEngineArgs(model=self.model, **chosen).create_engine_config()
            if config.parallel_config.data_parallel_size > 1:
                raise EngineError("start one engine for each data-parallel rank")
            # The CPU platform sets "spawn" while it makes the configuration.
            fork = {"VLLM_WORKER_MULTIPROC_METHOD": "fork"} if uni else {}
            threads = int(variables.get("OMP_NUM_THREADS", 0))
            with _environment(fork), _torch_threads(threads), _quiet():
                return AsyncLLM.from_vllm_config(
                    config, stat_loggers=[self.listener()], disable_log_stats=True
                )

    def _chosen(self, cpu: bool) -> dict[str, Any]:
        """Return the engine's arguments: what llmd needs, and what the user said."""
        from vllm.config import KVEventsConfig

        chosen: dict[str, Any] = {
            "served_model_name": list(self.names),
            "scheduling_policy": "priority",
            "use_tqdm_on_load": False,
            "kv_events_config": KVEventsConfig(
                enable_kv_cache_events=True,
                publisher="zmq",
                endpoint=self.events.events,
                replay_endpoint=self.events.replay,
                topic=self.events.topic,
            ),
            **(_CPU_OPTIONS if cpu else {}),
            **self.options,
        }
        if cpu and "max_loras" in chosen:
            # vLLM's CPU kernels take slot -1, the last, for requests without an
            # adapter: it must stay empty, or they are answered by that adapter.
            chosen["max_loras"] += 1
        return chosen


def in_thread(work: Callable[..., None], *arguments: Any) -> Future[None]:
    """Do *work* in a thread of its own, which whoever waits for it cannot stop.

    Not in the loop's executor: starts and ends of engines take long, and would
    keep others of its few threads.
    """
    done: Future[None] = Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            work(*arguments)
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="llmd-vllm").start()
    return done


@contextlib.contextmanager
def _turn(given_up: threading.Event) -> Iterator[None]:
    """Wait until no other engine starts."""
    while not _starting.acquire(timeout=_LOOK_S):
        _go_on(given_up)
    try:
        _go_on(given_up)
        yield
    finally:
        _starting.release()


def _go_on(given_up: threading.Event) -> None:
    if given_up.is_set():
        raise EngineError("the start was given up before it began")


@contextlib.contextmanager
def _killed_when(given_up: threading.Event) -> Iterator[None]:
    """Kill the cores that are started meanwhile, once *given_up* is set.

    vLLM waits for a core that does not come up for as long as it lives, and with
    it would wait the thread, every engine started later, and Python at its exit.
    """
    before, done = set(multiprocessing.active_children()), threading.Event()

    def watch() -> None:
        while not done.wait(_LOOK_S):
            if given_up.is_set():
                for child in multiprocessing.active_children():
                    if child not in before and child.name.startswith(_CORE):
                        child.kill()

    watcher = threading.Thread(target=watch, name="llmd-vllm-launch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Spare users what vLLM's own code is warned of; a fork inherits it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        yield


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Let forked engines compute with *count* threads each; 0 leaves it be.

    OpenMP reads its variable once, when torch was imported here, and a fork keeps
    that: with a thread for every core in each, two engines on two cores spin
    against each other and are ten times as slow.
    """
    import torch

    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processes(llm: Any) -> list[Any]:
    """Return the `multiprocessing` processes of an engine's cores."""
    resources = getattr(llm.engine_core, "resources", None)
    found = getattr(getattr(resources, "engine_manager", None), "processes", ())
    return list(found)


def shut_down(llm: Any, cores: list[Any]) -> None:
    """End the engine and its processes; blocks up to 15 s."""
    with contextlib.suppress(Exception):
        llm.shutdown()
    for core in cores:
        core.join(5.0)
        if core.is_alive():
            core.kill()
            core.join(5.0)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
