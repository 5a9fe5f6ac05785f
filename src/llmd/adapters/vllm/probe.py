"""Times the steps of real engines, and what lies between them and their clients.

    async with Server(llmd.Cluster()) as server:
        await server.add(VllmEngine("models/mine"), "w0")
        found = await calibrate(server)
    simulate(router, load, workers=found.workers, machines=found.machines,
             settings=found.settings)

It takes some 40 s, in which nobody else may ask.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

import attrs
import numpy as np

from ...errors import EngineError, InvalidHardware
from ...live import Server
from ...machines.fit import errors
from ...machines.shape import Shape
from ...router import Router
from ...sim.calibration import Calibration, Probed
from ...types import Request, Worker
from ...view import Floats, View
from .engine import VllmEngine
from .probe_sizes import Sizes
from .prober import Prober, together

_log = logging.getLogger(__name__)
_POOR = 0.1
"""Of the median error of a fit: on engines that it fits it was 1 to 4 %."""


async def calibrate(
    server: Server, sizes: Sizes | None = None, *, timeout_s: float = 600.0
) -> Calibration:
    """Probe all engines of *server* at once, as those of one host slow each other down.

    They should be alike, as all have the settings of the first.  What they have
    cached is lost.  The cluster's router is another meanwhile.

    Args:
        server: Its engines are vLLM's, of this process, and idle.
        sizes: What to ask them for; `Sizes.of` the first if not given.
        timeout_s: It takes some 40 s, and minutes on slow cores.

    Raises:
        EngineError: There is none; one is of another kind, is not idle, caches no
            prefixes, takes requests too short to tell anything, or failed; somebody
            asked meanwhile; time ran out; or what was timed makes no sense.
    """
    engines = {id: _vllm(id, engine) for id, engine in server.engines.items()}
    workers, cluster = server.cluster.view.workers, server.cluster
    if not engines:
        raise EngineError("no engine to probe: add one to the server")
    if workers.loads.any():
        raise EngineError("a probe wants idle engines, and some are asked by others")
    first = next(iter(engines.values()))._llm.vllm_config
    sizes = _fitting(Sizes.of(first) if sizes is None else sizes, first)
    ahead = bool(first.scheduler_config.async_scheduling)
    probers = [Prober(server, id, sizes, ahead) for id in engines]
    asked = Asked()
    router, cluster.router = cluster.router, asked
    try:
        async with asyncio.timeout(timeout_s):
            await _clear(engines.values())
            await together(prober.run() for prober in probers)
            await _clear(engines.values())
    except TimeoutError as error:
        raise EngineError(f"the probe took more than {timeout_s} s") from error
    except ExceptionGroup as group:
        raise EngineError(f"the probe failed: {group.exceptions[0]}") from group
    finally:
        cluster.router = router
    if asked.others:
        raise EngineError("others asked these engines meanwhile: probe them again")
    facts = {worker.id: worker for worker in _apart(workers.facts)}
    found = [prober.found(facts[prober.worker]) for prober in probers]
    try:
        return _calibration(found, first, ahead)
    except InvalidHardware as error:
        raise EngineError(f"what was timed makes no machine: {error}") from error


def _calibration(found: list[Probed], config: Any, ahead: bool) -> Calibration:
    scheduler = config.scheduler_config
    made = Calibration(
        engines=tuple(found),
        step_tokens=scheduler.max_num_batched_tokens,
        steps_ahead=int(ahead),
        graph_tokens=_graph_tokens(config),
        by_priority=scheduler.policy == "priority",
        **_bytes(config),
    )
    for probed in found:
        fit = errors(made.machines[probed.worker.machine], probed.steps)
        if fit.median > _POOR:
            _log.warning("step times of %s fit poorly: %s", probed.worker.id, fit)
    return made


class Asked(Router):
    """Sends a request to the worker that its session names.

    Attributes:
        others: How often it was asked about a request that names none.
    """

    def __init__(self) -> None:
        self.others = 0

    def cost(self, request: Request, view: View) -> Floats:
        if request.session not in view.workers.ids:
            self.others += 1
        return np.array([float(id != request.session) for id in view.workers.ids])


def _graph_tokens(config: Any) -> float:
    """Return the tokens of the largest step with a prompt that is a CUDA graph."""
    graphs = config.compilation_config
    if not graphs.cudagraph_mode.has_piecewise_cudagraphs():
        return 0.0
    return float(graphs.max_cudagraph_capture_size)


def _fitting(sizes: Sizes, config: Any) -> Sizes:
    """Return *sizes*, if they tell something of such an engine."""
    budget = config.scheduler_config.max_num_batched_tokens
    if sizes.step_tokens != budget:
        raise EngineError(f"sizes are of steps of {sizes.step_tokens}, not of {budget}")
    if not config.cache_config.enable_prefix_caching:
        raise EngineError(
            "without prefix caching no prompt is cached, which is how steps are told"
            " apart: probe with it, and set EngineSettings(prefix_caching=False) then"
        )
    return sizes


def _apart(workers: Iterable[Worker]) -> Iterable[Worker]:
    """Give engines that name one machine a machine each: they need not be alike."""
    known = list(workers)
    if len({worker.machine for worker in known}) == len(known):
        return known
    return [attrs.evolve(worker, machine=worker.id) for worker in known]


def _bytes(config: Any) -> dict[str, float]:
    """Return what a token's KV and the model take, of a dense model."""
    model = config.model_config
    try:
        shape = Shape.from_config(model.hf_text_config.to_dict())
    except InvalidHardware as error:
        _log.warning("bytes of KV and weights stay those of the default: %s", error)
        return {}
    number = float(model.dtype.itemsize)
    kv = 1.0 if "fp8" in str(config.cache_config.cache_dtype) else number
    shape = attrs.evolve(shape, weight_bytes=number, kv_element_bytes=kv)
    return {
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "weights_bytes": shape.weights_bytes,
    }


def _vllm(id: str, engine: object) -> VllmEngine:
    if not isinstance(engine, VllmEngine):
        kind = type(engine).__name__
        raise EngineError(f"{id!r} is a {kind}: only a VllmEngine tells what is probed")
    return engine


async def _clear(engines: Iterable[VllmEngine]) -> None:
    """Empty their caches, and let the index hear of it."""
    for engine in engines:
        await engine._llm.reset_prefix_cache()
    await asyncio.sleep(0.5)
