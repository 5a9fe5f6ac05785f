"""Probe a real engine, and compare what the simulator says with what it does.

Run where vLLM is installed: python examples/calibrate.py [MODEL]
The probe of the tiny model takes a few seconds, that of a large one some 40 s.
"""

import asyncio
import sys

import llmd
from llmd.adapters.vllm.engine import VllmEngine
from llmd.adapters.vllm.probe import calibrate
from llmd.adapters.vllm.tiny import make_model
from llmd.live import Server
from llmd.loadgen import LoadGenerator, ScheduleLag
from llmd.sim import simulate, workloads

OPTIONS = {"max_model_len": 1024, "kv_cache_memory_bytes": 16 << 20}
LOAD = workloads.batch(requests=40, rate=4.0, prompt_tokens=400, answer_tokens=40)


async def main(model: str) -> None:
    async with Server(llmd.Cluster()) as server:
        await server.add(VllmEngine(model, options=OPTIONS), "a")
        found = await calibrate(server)
        found.save("calibration.json")  # Calibration.load reads it, anywhere
        print(found)
        # The router that serves is the one that is simulated.
        server.cluster.router = llmd.LeastLoaded()
        try:
            measured = await LoadGenerator(server, vocabulary=500).run(LOAD)
        except ScheduleLag as lag:  # beside other work on these cores
            print(f"nothing was measured: {lag}")
            return
    simulated = simulate(
        llmd.LeastLoaded(),
        LOAD,
        workers=found.workers,
        machines=found.machines,
        settings=found.settings,
    )
    print("ms              measured  simulated")
    for name in ("ttft", "tpot", "e2e"):
        pair = [1e3 * getattr(report, name)(50) for report in (measured, simulated)]
        print(f"{name} p50        {pair[0]:8.1f}   {pair[1]:8.1f}")


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else str(make_model(".models/tiny"))
    asyncio.run(main(model))
