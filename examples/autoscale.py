"""Four engines at most, a burst, and silence: watch the fleet follow.

    python examples/autoscale.py [--hpa MANIFEST] [--plot PATH]

Real vLLM engines of a tiny model.  With `--hpa` a HorizontalPodAutoscaler decides.
"""

import argparse
import asyncio
import logging
import pathlib
import time
from functools import partial
from importlib.util import find_spec

import llmd
from llmd.adapters.hpa_manifest import load
from llmd.adapters.vllm.engine import VllmEngine
from llmd.adapters.vllm.tiny import make_model
from llmd.autoscaler import Percent, Rules, TargetConcurrency
from llmd.autoscaler.hpa import Hpa
from llmd.balancer import FlowControl, SlowStart
from llmd.live import EnginePool, Server

OPTIONS = {"max_model_len": 1024, "kv_cache_memory_bytes": 16 << 20, "max_num_seqs": 5}


def make_policy(manifest):
    if manifest:
        return Hpa(spec=load(pathlib.Path(manifest).read_text()).spec, interval=1.0)
    up = Rules(rates=(Percent(100, 2.0),))
    return TargetConcurrency(requests_per_worker=5, max_workers=4, patience=10.0, up=up)


async def ask(server, number):
    prompt = [number * 17 % 400 + 4, *range(10, 60)]
    request = llmd.Request(id=f"r{number}", prompt=prompt, max_new_tokens=100)
    return [output async for output in server.generate(request, {"ignore_eos": True})]


async def watch(server, course):
    begun = time.monotonic()
    while True:
        workers, waiting = server.cluster.view.workers, len(server.cluster.view.waiting)
        ready, coming = int(workers.ready().sum()), int(workers.supply().sum())
        running, at = int(workers.running_requests.sum()), time.monotonic() - begun
        if not course or course[-1][1:3] != (ready, coming):
            bar = "#" * ready + "." * (coming - ready)
            print(f"{at:6.1f} s  {bar:4}  {running:3} running {waiting:3} waiting")
            print(server.cluster.autoscaler.advice or "")
        course.append((at, ready, coming, running, waiting))
        await asyncio.sleep(0.5)


async def run(model, policy, course):
    balancer = FlowControl(llmd.Fcfs(), rooms=[SlowStart(ramp=5.0)])
    cluster = llmd.Cluster(autoscaler=policy, balancer=balancer)
    make = partial(VllmEngine, model, options=OPTIONS)
    async with Server(cluster) as server, EnginePool(server, make):
        watcher = asyncio.create_task(watch(server, course))
        answers = await asyncio.gather(*(ask(server, n) for n in range(60)))
        print(f"{len(answers)} requests answered")
        while cluster.view.workers.supply().sum() > 1:  # noqa: ASYNC110
            await asyncio.sleep(0.5)
        watcher.cancel()


def plot(course, path):
    from matplotlib import pyplot

    at, ready, coming, running, waiting = zip(*course, strict=True)
    _, (above, below) = pyplot.subplots(2, sharex=True)
    above.stackplot(at, running, waiting, labels=["running", "waiting"])
    below.step(at, [*zip(coming, ready, strict=True)], label="starting or ready, ready")
    above.legend(), below.legend(), below.set_xlabel("seconds")
    pyplot.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hpa", metavar="MANIFEST")
    parser.add_argument("--plot", metavar="PATH")
    options = parser.parse_args()
    if options.plot and not find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install llmd-scheduler[plot]")
    logging.disable(logging.WARNING)
    model = str(make_model(".models/tiny"))
    asyncio.run(run(model, make_policy(options.hpa), course := []))
    _ = options.plot and plot(course, options.plot)
