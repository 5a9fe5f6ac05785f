"""Two 7B-shape engines take turns on one GPU: what switching really costs.

    python benchmarks/gpu/timeslice.py OUT [PART]

Needs a Hopper GPU, vLLM >= 0.26 and llmd with attrs, numpy and sortedcontainers.
Random weights, no download.  Writes OUT/timeslice.json after every part, each of
which runs in a process of its own, so that one that fails loses nothing else:

    link     device by NVML, pinned copies in each direction
    restart  an engine stopped and started again
    tier0    both engines resident: switch by pause and resume
    tier3    engines that do not fit together: switch by sleep and wake, against
             the formula
    phases   the same engines under two loads that alternate: the policy as it
             comes against a lock held for whole jobs, twice, in turns
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import attrs

from llmd.live import Call, Engine, Output, SharedGpu
from llmd.machines import H200, VLLM_SLEEP, calibrate_host, detect
from llmd.machines.hardware import GIB
from llmd.machines.shape import QWEN25_7B, Shape
from llmd.timeslice import (
    FifoLock,
    GpuArbiter,
    GpuView,
    QuantumScheduler,
    Sharer,
    Turn,
    TurnTaken,
)
from llmd.types import Request, Worker

SHAPE: Shape = QWEN25_7B
LIMITS_S = {"link": 60, "restart": 120, "tier0": 170, "tier3": 240, "phases": 330}
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


# Engines --------------------------------------------------------------------


def model_dir() -> str:
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": SHAPE.hidden,
        "intermediate_size": SHAPE.intermediate,
        "num_hidden_layers": SHAPE.layers,
        "num_attention_heads": SHAPE.heads,
        "num_key_value_heads": SHAPE.kv_heads,
        "vocab_size": SHAPE.vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "use_sliding_window": False,
        "use_cache": True,
    }
    path = Path(tempfile.gettempdir()) / "llmd-qwen7b-shape"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


class RawEngine(Engine):
    """vLLM's own engine and nothing else, so that only switching is measured."""

    def __init__(self, utilization: float, kv_bytes: float) -> None:
        self.utilization, self.kv_bytes = utilization, kv_bytes
        self.llm: Any = None
        self.start_s = math.nan
        self.took: dict[str, list[float]] = {}

    async def start(self, worker: str, report: Any, progress: Any) -> Worker:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        began = time.perf_counter()
        args = AsyncEngineArgs(
            model=model_dir(),
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            gpu_memory_utilization=self.utilization,
            kv_cache_memory_bytes=int(self.kv_bytes),
            max_model_len=8192,
            max_num_seqs=64,
            enable_prefix_caching=True,
            enable_sleep_mode=True,
            disable_log_stats=True,
        )
        self.llm = AsyncLLM.from_engine_args(args)
        self.start_s = time.perf_counter() - began
        await drain(self, request(f"{worker}-warm", 512, 4))
        return Worker(id=worker)

    async def generate(self, call: Call) -> AsyncIterator[Output]:
        from vllm.sampling_params import RequestOutputKind

        from vllm import SamplingParams

        asked = call.request
        params = SamplingParams(
            max_tokens=asked.max_new_tokens,
            ignore_eos=True,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": asked.prompt.ids.tolist()}
        async for piece in self.llm.generate(prompt, params, request_id=asked.id):
            yield Output(token_ids=tuple(piece.outputs[0].token_ids))

    async def abort(self, request_id: str) -> None:
        await self.llm.abort(request_id)

    async def stop(self) -> None:
        llm, self.llm = self.llm, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)

    async def pause(self) -> None:
        await self._timed(
            "pause", self.llm.pause_generation(mode="keep", clear_cache=False)
        )

    async def resume(self) -> None:
        await self._timed("resume", self.llm.resume_generation())

    async def sleep(self) -> None:
        import inspect

        modes = "mode" in inspect.signature(self.llm.sleep).parameters
        if not modes:
            await self.llm.pause_generation(mode="keep", clear_cache=True)
        kept = {"mode": "keep"} if modes else {}
        await self._timed("sleep", self.llm.sleep(level=1, **kept))

    async def wake(self) -> None:
        await self._timed("wake", self.llm.wake_up())
        await self.llm.pause_generation(mode="keep", clear_cache=False)

    async def _timed(self, name: str, work: Any) -> None:
        began = time.perf_counter()
        await work
        self.took.setdefault(name, []).append(time.perf_counter() - began)


def request(name: str, prompt_tokens: int, new_tokens: int, salt: int = 1) -> Request:
    ids = [(salt * 7919 + k * 104729) % 150_000 + 1000 for k in range(prompt_tokens)]
    return Request(id=name, prompt=ids, max_new_tokens=new_tokens)


async def drain(engine: Engine, asked: Request) -> tuple[list[int], float, float]:
    """Return the tokens, the time to the first and to the last."""
    began = time.perf_counter()
    tokens: list[int] = []
    first = math.nan
    async for piece in engine.generate(Call(request=asked)):
        if not tokens:
            first = time.perf_counter() - began
        tokens += piece.token_ids
    return tokens, first, time.perf_counter() - began


# Measuring ------------------------------------------------------------------


@attrs.define
class Result:
    """Saves what is known whenever something is added."""

    path: Path
    values: dict[str, Any] = attrs.field(factory=dict)

    def add(self, **values: Any) -> None:
        self.values.update(values)
        self.path.write_text(json.dumps(self.values, indent=1, default=str))
        print(json.dumps(values, default=str)[:400], flush=True)

    async def attempt(self, name: str, work: Any, seconds: float) -> None:
        began = time.perf_counter()
        try:
            self.add(**{name: await asyncio.wait_for(work, seconds)})
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            trace = "".join(traceback.format_exception(error))[-1500:]
            self.add(**{name: {"failed": repr(error)[:300], "trace": trace}})
        self.add(**{f"{name}_wall_s": time.perf_counter() - began})


def spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "median": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
        "max": ordered[-1],
    }


def runs_of(turns: list[TurnTaken]) -> list[TurnTaken]:
    """Join turns of one engine that follow each other: nothing was switched."""
    joined: list[TurnTaken] = []
    for turn in turns:
        if joined and joined[-1].engine == turn.engine:
            joined[-1] = attrs.evolve(joined[-1], ended_at=turn.ended_at)
        else:
            joined.append(turn)
    return joined


def of_turns(turns: list[TurnTaken]) -> dict[str, Any]:
    """What switching cost, from the second turn on."""
    turns = runs_of(turns)
    switches = [turn.began_at - turn.chosen_at for turn in turns[1:]]
    gaps = [
        later.began_at - turn.ended_at
        for row, turn in enumerate(turns)
        for later in [
            next((t for t in turns[row + 1 :] if t.engine == turn.engine), None)
        ]
        if later is not None
    ]
    # Whole cycles: from the end of a switch to the end of a later one.
    ran = sum(turn.ended_at - turn.began_at for turn in turns[:-1])
    took = turns[-1].began_at - turns[0].began_at if len(turns) > 1 else math.nan
    return {
        "turns": len(turns),
        "switch_s": spread(switches),
        "gap_s": spread(gaps),
        "run_s": spread([turn.ended_at - turn.began_at for turn in turns[:-1]]),
        "waste": 1 - ran / took if len(turns) > 1 else math.nan,
        "timeline": [
            [
                t.engine,
                *(
                    round(x - turns[0].chosen_at, 3)
                    for x in (t.chosen_at, t.began_at, t.ended_at)
                ),
            ]
            for t in turns[:60]
        ],
    }


async def saturate(
    gpu: SharedGpu, shared: dict[str, Engine], seconds: float, label: str
) -> dict[str, Any]:
    """Keep both engines busy for a while; every request must end in full."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    end = began + seconds
    tokens = dict.fromkeys(shared, 0)
    short = 0

    async def client(name: str, lane: int) -> None:
        nonlocal short
        count = 0
        while loop.time() < end:
            asked = request(f"{label}-{name}-{lane}-{count}", 256, 100, lane)
            got, _, _ = await drain(shared[name], asked)
            tokens[name] += len(got)
            short += len(got) != 100
            count += 1

    await asyncio.gather(*(client(name, lane) for name in shared for lane in range(16)))
    # While both were busy: not the turn before, nor the tail of one alone.
    turns = [t for t in gpu.arbiter.history if began <= t.chosen_at <= end]
    return {**of_turns(turns), "tokens": tokens, "short_answers": short}


class JobLock(FifoLock):
    """A lock that its holder keeps for a whole job, gaps and all."""

    def __init__(self) -> None:
        super().__init__(linger_s=math.inf)
        self.over: set[str] = set()

    def next(self, view: GpuView) -> Turn:
        if view.running in self.over:
            rivals = [s for s in view.wanting if s.engine != view.running]
            if rivals:
                return Turn(rivals[0].engine)
        return super().next(view)


async def phases(
    gpu: SharedGpu,
    shared: dict[str, Engine],
    label: str,
    *,
    cycles: int = 3,
    off_s: float = 6.0,
    new_tokens: int = 200,
    over: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Two jobs, each bursts of 16 requests with pauses between: busy, then idle."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    latencies: list[float] = []
    busy = dict.fromkeys(shared, 0.0)

    async def one(name: str, asked: Request) -> None:
        start = loop.time()
        stream = shared[name].generate(Call(request=asked))
        tokens = [loop.time() async for _ in stream]
        latencies.append(tokens[-1] - start)
        # Tokens come every step; a longer gap was somebody else's turn.
        steps = [b - a for a, b in zip([*tokens][:-1], [*tokens][1:], strict=True)]
        if asked.id.endswith("-0"):
            busy[name] += sum(step for step in steps if step < 0.2)

    async def job(name: str) -> None:
        for cycle in range(cycles):
            asked = [
                request(f"{label}-{name}-{cycle}-{lane}", 256, new_tokens, lane)
                for lane in range(16)
            ]
            await asyncio.gather(*(one(name, each) for each in asked))
            if cycle < cycles - 1:
                await asyncio.sleep(off_s)
        over(name)
        gpu.tell(gpu_asked)

    await asyncio.gather(*(job(name) for name in shared))
    took = loop.time() - began
    return {
        "seconds": took,
        "duty": sum(busy.values()) / took,
        "busy_s": busy,
        "latency_s": spread(latencies),
        **of_turns([t for t in gpu.arbiter.history if t.chosen_at >= began]),
    }


def gpu_asked(at: float) -> Any:
    from llmd.timeslice import Asked

    return Asked(at)


# Parts ----------------------------------------------------------------------


def nvml_module() -> Any:
    try:
        import pynvml
    except ImportError:
        from vllm.third_party import pynvml
    return pynvml


def used_bytes() -> int:
    nvml = nvml_module()
    nvml.nvmlInit()
    device = nvml.nvmlDeviceGetHandleByIndex(0)
    return int(nvml.nvmlDeviceGetMemoryInfo(device).used)


async def link(result: Result) -> None:
    from llmd.adapters.nvml import read

    answers = read(nvml_module())
    result.add(answers=[attrs.asdict(one) for one in answers])
    hardware = detect(answers[0]).hardware
    import torch

    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")

    def timed(target: Any, source: Any) -> Callable[[int], float]:
        def copy(size: int) -> float:
            torch.cuda.synchronize()
            began = time.perf_counter()
            target[:size].copy_(source[:size], non_blocking=True)
            torch.cuda.synchronize()
            return time.perf_counter() - began

        return copy

    measured = calibrate_host(hardware, timed(device, host), timed(host, device)).host
    result.add(profile=hardware.name, host=attrs.asdict(measured))


@contextlib.asynccontextmanager
async def pair(
    result: Result, kv_bytes: float, *, asleep: bool, memory_bytes: float = math.inf
) -> AsyncIterator[tuple[SharedGpu, dict[str, Engine], dict[str, RawEngine]]]:
    """Start two engines that share the GPU."""
    total = float(result.values["memory_bytes"])
    awake = SHAPE.weights_bytes + kv_bytes + 3 * GIB
    gpu = SharedGpu(GpuArbiter(QuantumScheduler(), memory_bytes=memory_bytes))
    raw: dict[str, RawEngine] = {}
    shared: dict[str, Engine] = {}
    try:
        async with gpu:
            for name in "ab":
                raw[name] = RawEngine(min(0.92, awake / total), kv_bytes)
                sharer = Sharer(
                    engine=name,
                    awake_bytes=awake if asleep else 0.0,
                    asleep_bytes=2 * GIB if asleep else 0.0,
                    sleep_s=VLLM_SLEEP.sleep_s(H200, SHAPE.weights_bytes),
                    wake_s=VLLM_SLEEP.wake_s(H200, SHAPE.weights_bytes),
                )
                shared[name] = gpu.share(raw[name], sharer, starts_asleep=asleep)
                began, used = time.perf_counter(), used_bytes()
                await shared[name].start(name, lambda report: None, lambda state: None)
                result.add(
                    **{
                        f"start_{name}_s": raw[name].start_s,
                        f"start_and_sleep_{name}_s": time.perf_counter() - began,
                        f"held_{name}_bytes": used_bytes() - used,
                    }
                )
            yield gpu, shared, raw
    finally:
        for engine in raw.values():
            with contextlib.suppress(Exception):
                await asyncio.wait_for(engine.stop(), 20)


async def tier0(result: Result) -> None:
    async with pair(result, 8 * GIB, asleep=False) as (gpu, shared, raw):
        gpu.arbiter.policy = QuantumScheduler(quantum_s=0.5)
        await result.attempt("quantum", saturate(gpu, shared, 10.0, "q"), 40)
        took = {name: engine.took for name, engine in raw.items()}
        result.add(
            pause_s=spread([s for one in took.values() for s in one.get("pause", [])]),
            resume_s=spread(
                [s for one in took.values() for s in one.get("resume", [])]
            ),
        )
        await result.attempt("same_tokens", same_tokens(gpu, shared), 30)
        gpu.arbiter.policy = QuantumScheduler(quantum_s=2.0)
        await result.attempt("phases_quantum", phases(gpu, shared, "pq", off_s=4.0), 60)
        lock = gpu.arbiter.policy = JobLock()
        await result.attempt(
            "phases_lock",
            phases(gpu, shared, "pl", off_s=4.0, over=lock.over.add),
            80,
        )


async def same_tokens(gpu: SharedGpu, shared: dict[str, Engine]) -> dict[str, Any]:
    """Compare an answer that was interrupted with one that was not."""
    alone, _, _ = await drain(shared["a"], request("alone", 300, 120))
    before = len(gpu.arbiter.history)
    cut, other = await asyncio.gather(
        drain(shared["a"], request("cut", 300, 120)),
        drain(shared["b"], request("other", 300, 120)),
    )
    same = [x == y for x, y in zip(alone, cut[0], strict=False)]
    return {
        "turns": len(gpu.arbiter.history) - before,
        "equal": alone == cut[0],
        "equal_up_to": same.index(False) if False in same else len(same),
        "other_equal": alone == other[0],
        "tokens": len(cut[0]),
    }


@contextlib.asynccontextmanager
async def too_large(
    result: Result,
) -> AsyncIterator[tuple[SharedGpu, dict[str, Engine], dict[str, RawEngine]]]:
    """Start two engines that want more than half of the GPU each."""
    total = float(result.values["memory_bytes"])
    kv_bytes = total * 0.56 - SHAPE.weights_bytes - 3 * GIB
    result.add(kv_wanted_bytes=kv_bytes)
    async with pair(result, kv_bytes, asleep=True, memory_bytes=total * 0.95) as both:
        yield both


async def tier3(result: Result) -> None:
    async with too_large(result) as (gpu, shared, raw):
        quantum_s = 4.0
        gpu.arbiter.policy = QuantumScheduler(quantum_s=quantum_s)
        await result.attempt("quantum", saturate(gpu, shared, 22.0, "q"), 60)
        result.add(formula=against_formula(result.values, quantum_s))
        gpu.arbiter.policy = QuantumScheduler(quantum_s=1.0)
        await result.attempt("same_tokens", same_tokens(gpu, shared), 25)
        result.add(took={name: engine.took for name, engine in raw.items()})
        result.add(asleep_or_awake_bytes=used_bytes())


async def alternating(result: Result) -> None:
    async with too_large(result) as (gpu, shared, _):
        gpu.arbiter.policy = QuantumScheduler()
        # The first batch of a size is slower, whoever decides.
        await result.attempt("warm", phases(gpu, shared, "w", cycles=1), 40)
        for turn in range(2):
            gpu.arbiter.policy = QuantumScheduler()
            work = phases(gpu, shared, f"q{turn}")
            await result.attempt(f"quantum_{turn}", work, 75)
            lock = gpu.arbiter.policy = JobLock()
            work = phases(gpu, shared, f"l{turn}", over=lock.over.add)
            await result.attempt(f"lock_{turn}", work, 90)


def against_formula(values: dict[str, Any], quantum_s: float) -> dict[str, Any]:
    seen = values.get("quantum", {})
    if "switch_s" not in seen:
        return {}
    switch_s = seen["switch_s"]["median"]
    predicted = VLLM_SLEEP.switch_s(H200, SHAPE.weights_bytes, SHAPE.weights_bytes)
    return {
        "switch_predicted_s": predicted,
        "switch_measured_s": switch_s,
        "switch_ratio": switch_s / predicted,
        "waste_formula": switch_s / (quantum_s + switch_s),
        "waste_measured": seen["waste"],
        "gap_formula_s": quantum_s + 2 * switch_s,
        "gap_measured_s": seen["gap_s"]["median"],
    }


async def restart(result: Result) -> None:
    """The switch of those who cannot sleep: stop an engine, start the other."""
    total = float(result.values["memory_bytes"])
    kv_bytes = total * 0.56 - SHAPE.weights_bytes - 3 * GIB
    engine = RawEngine(0.6, kv_bytes)
    await engine.start("first", None, None)
    result.add(first_start_s=engine.start_s)
    for turn in range(2):
        began = time.perf_counter()
        await engine.stop()
        # The driver takes memory back some time after the process is gone.
        async with asyncio.timeout(20):
            while total - used_bytes() < total * 0.6:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        stopped = time.perf_counter() - began
        engine = RawEngine(0.6, kv_bytes)
        await engine.start(f"again{turn}", None, None)
        took = time.perf_counter() - began
        result.add(**{f"restart_{turn}_s": took, f"stop_{turn}_s": stopped})
    await engine.stop()


PARTS = {
    "link": link,
    "restart": restart,
    "tier0": tier0,
    "tier3": tier3,
    "phases": alternating,
}


def run_part(name: str, out: Path) -> None:
    result = Result(out / f"timeslice-{name}.json")
    nvml = nvml_module()
    nvml.nvmlInit()
    device = nvml.nvmlDeviceGetHandleByIndex(0)
    total = nvml.nvmlDeviceGetMemoryInfo(device).total
    result.add(part=name, memory_bytes=total)
    began = time.perf_counter()
    try:
        asyncio.run(PARTS[name](result))
    except BaseException as error:
        result.add(failed=repr(error)[:500], trace=traceback.format_exc()[-3000:])
    result.add(wall_s=time.perf_counter() - began)
    # Whatever an engine left behind must not keep this process.
    os._exit(0)


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
    out.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) > 2:
        run_part(sys.argv[2], out)
        return
    whole: dict[str, Any] = {"started": time.strftime("%Y-%m-%d %H:%M:%S")}
    for name, limit_s in LIMITS_S.items():
        command = [sys.executable, __file__, str(out), name]
        child = subprocess.Popen(command, start_new_session=True)
        try:
            child.wait(limit_s)
        except subprocess.TimeoutExpired:
            whole[f"{name}_timed_out"] = limit_s
        finally:
            # The part's own session: its engines, and nobody else's.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, 9)
        child.wait()
        part = out / f"timeslice-{name}.json"
        whole[name] = json.loads(part.read_text()) if part.exists() else None
        (out / "timeslice.json").write_text(json.dumps(whole, indent=1))


if __name__ == "__main__":
    main()
