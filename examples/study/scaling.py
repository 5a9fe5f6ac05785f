"""Row 7: an HPA's rules start and stop real engines."""

import asyncio
import itertools
import time

import attrs

import llmd
from llmd import commands as c
from llmd import events as e
from llmd.adapters.vllm.engine import VllmEngine
from llmd.autoscaler import Behavior, Count, Percent, Rules
from llmd.autoscaler.hpa import AverageValue, Hpa, HpaSpec, Object, Pods, Value
from llmd.live import EnginePool, Server
from llmd.types import State

from .row import OPTIONS, ask, prefix

# The study's signals; the windows are shortened so that the row takes a minute.
SPEC = HpaSpec(
    min_replicas=1,
    max_replicas=4,
    metrics=(
        Object("inference_extension_flow_control_queue_size", Value(5)),
        Pods("vllm:kv_cache_usage_perc", AverageValue("800m")),
        Pods("vllm:num_requests_running", AverageValue(10)),
    ),
    behavior=Behavior(
        up=Rules(window=0.0, rates=(Count(1, 2.0),)),
        down=Rules(window=6.0, rates=(Percent(100, 2.0),)),
    ),
)


@attrs.define
class Course:
    """What the fleet did over time, and who got traffic before it was ready."""

    begun: float = attrs.field(factory=time.monotonic)
    wanted: list[int] = attrs.field(factory=list)
    early: int = 0
    requeued: int = 0
    advice: list = attrs.field(factory=list)
    samples: list[tuple[float, int, int, int, int]] = attrs.field(factory=list)
    _ready: set[str] = attrs.field(factory=set)

    def __call__(self, item):
        match item:
            case c.Scale(workers=workers, advice=advice):
                self.wanted.append(workers)
                self.advice.append(advice)
            case e.WorkerChanged(worker=worker, facts=llmd.Worker()):
                self._ready.add(worker)
            case e.WorkerChanged(worker=worker, state=State.DRAINING):
                self._ready.discard(worker)
            case c.Dispatch(decision=decision):
                self.early += decision.decode not in self._ready

    async def sample(self, server):
        """Note (seconds, wanted, ready, running, waiting) twice a second."""
        while True:
            view = server.cluster.view
            running = int(view.workers.running_requests.sum())
            ready = int(view.workers.ready().sum())
            at = round(time.monotonic() - self.begun, 1)
            wanted = self.wanted[-1] if self.wanted else 0
            self.samples.append((at, wanted, ready, running, len(view.waiting)))
            await asyncio.sleep(0.5)

    def text(self):
        """Draw it: one line whenever the fleet changed."""
        lines = [" seconds  wanted  ready  running  waiting"]
        changes = itertools.groupby(self.samples, key=lambda sample: sample[1:3])
        for _, (first, *_) in changes:
            at, wanted, ready, running, waiting = first
            bar = "#" * ready + "." * max(wanted - ready, 0)
            lines.append(f"{at:8} {wanted:7} {ready:6} {running:8} {waiting:8}  {bar}")
        return "\n".join(lines)


async def run(model, clients=20, seconds=120.0):
    """Keep *clients* busy until the fleet is full, then be silent; return it all."""
    course = Course()
    policy = Hpa(spec=SPEC, interval=1.0)
    cluster = llmd.Cluster(autoscaler=policy, observer=course)
    options = {**OPTIONS, "max_num_seqs": 5}

    def make():
        return VllmEngine(model, options=options)

    async def until(true, most):
        async with asyncio.timeout(most):
            while not true():  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    async def client(number, stop):
        answered = 0
        while not stop.is_set():
            prompt = [*prefix(number, 64), answered % 400 + 4]
            tokens, _, _ = await ask(server, f"{number}-{answered}", prompt, new=100)
            answered += len(tokens) == 100
        return answered

    async with (
        Server(cluster) as server,
        EnginePool(server, make, drain_timeout=seconds) as pool,
        asyncio.TaskGroup() as group,
    ):
        sampler = group.create_task(course.sample(server))
        ready = cluster.view
        await until(lambda: ready.workers.ready().sum() == 1, seconds)
        stop = asyncio.Event()
        load = [group.create_task(client(n, stop)) for n in range(clients)]
        await until(lambda: ready.workers.ready().sum() == SPEC.max_replicas, seconds)
        stop.set()
        answered = sum(await asyncio.gather(*load))
        await until(lambda: len(server.engines) == SPEC.min_replicas, seconds)
        await asyncio.sleep(3.0)
        sampler.cancel()
        course.requeued = server.counts["requeued"]
        failures = list(pool.failures)
    return course, answered, failures


async def autoscaling(model):
    course, answered, failures = await run(model)
    print(course.text())
    print(course.advice[1].explain())
    moves = [after > before for before, after in itertools.pairwise(course.wanted)]
    ready = [sample[2] for sample in course.samples]
    passed = (
        moves == sorted(moves, reverse=True)
        and max(course.wanted) == max(ready) == 4
        and course.wanted[-1] == ready[-1] == 1
        and answered >= 20
        and not (course.early or failures)
    )
    said = (
        f"wanted {course.wanted}, ready at most {max(ready)}, at the end {ready[-1]};"
        f" {answered} requests answered, 0 failed, {course.early} sent before ready,"
        f" {course.requeued} moved"
    )
    return passed, said
