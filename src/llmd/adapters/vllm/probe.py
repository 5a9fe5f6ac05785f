"""Times the steps of real engines, and what lies between them and their clients.

    async with Server(llmd.Cluster()) as server:
        await server.add(VllmEngine("models/mine"), "w0")
        found = await calibrate(server)
    simulate(router, load, workers=found.workers, machines=found.machines,
             settings=found.settings)

It takes half a minute, in which nobody else may ask.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import numpy as np

from ...errors import EngineError
from ...live import Server
from ...router import Router
from ...sim.calibration import Calibration
from ...types import Request
from ...view import Floats, View
from .engine import VllmEngine
from .probe_sizes import Sizes
from .prober import Prober, together


async def calibrate(
    server: Server, sizes: Sizes | None = None, *, timeout_s: float = 600.0
) -> Calibration:
    """Probe all engines of *server* at once, as those of one host slow each other down.

    They should be alike, as all have the settings of the first.  What they have
    cached is lost.  The cluster's router is another meanwhile.

    Args:
        server: Its engines are vLLM's, of this process, and idle.
        sizes: What to ask them for; `Sizes.of` the first if not given.
        timeout_s: It takes half a minute, and several on slow cores.

    Raises:
        EngineError: There is none, one is of another kind, is not idle, takes requests
            too short to tell anything, or failed, or time ran out.
    """
    engines = {id: _vllm(id, engine) for id, engine in server.engines.items()}
    workers, cluster = server.cluster.view.workers, server.cluster
    if not engines:
        raise EngineError("no engine to probe: add one to the server")
    if workers.loads.any():
        raise EngineError("a probe wants idle engines, and some are asked by others")
    first = next(iter(engines.values()))._llm.vllm_config
    sizes = Sizes.of(first) if sizes is None else sizes
    ahead = bool(first.scheduler_config.async_scheduling)
    probers = [Prober(server, id, sizes, ahead) for id in engines]
    router, cluster.router = cluster.router, Asked()
    try:
        async with asyncio.timeout(timeout_s):
            await _clear(engines.values())
            await together(prober.run() for prober in probers)
            await _clear(engines.values())
    except TimeoutError as error:
        raise EngineError(f"the probe took more than {timeout_s} s") from error
    except ExceptionGroup as errors:
        raise EngineError(f"the probe failed: {errors.exceptions[0]}") from errors
    finally:
        cluster.router = router
    facts = {worker.id: worker for worker in workers.facts}
    return Calibration(
        engines=tuple([prober.found(facts[prober.worker]) for prober in probers]),
        step_tokens=sizes.step_tokens,
        steps_ahead=int(ahead),
        graph_tokens=graph_tokens(first),
    )


class Asked(Router):
    """Sends a request to the worker that its session names."""

    def cost(self, request: Request, view: View) -> Floats:
        return np.array([float(id != request.session) for id in view.workers.ids])


def graph_tokens(config: Any) -> float:
    """Return the tokens of the largest step with a prompt that is a CUDA graph."""
    graphs = config.compilation_config
    if not graphs.cudagraph_mode.has_piecewise_cudagraphs():
        return 0.0
    return float(graphs.max_cudagraph_capture_size)


def _vllm(id: str, engine: object) -> VllmEngine:
    if not isinstance(engine, VllmEngine):
        kind = type(engine).__name__
        raise EngineError(f"{id!r} is a {kind}: only a VllmEngine tells what is probed")
    return engine


async def _clear(engines: Iterable[VllmEngine]) -> None:
    """Empty their caches."""
    for engine in engines:
        await engine._llm.reset_prefix_cache()
    await asyncio.sleep(0.5)
