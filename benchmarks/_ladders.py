"""Two benchmarks of llm-d's: what was sent, to which pods, by which policies.

The 73-capacity one is what this simulator's models of gauges, prompts and shared
prefixes were fitted to.  The 37-capacity one was run by the same people with another
model on other pods, and takes from itself no more than two gaps between tokens.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs
import numpy as np

import llmd
from llmd.machines import H100, Machine
from llmd.machines.shape import Shape
from llmd.router.interface import Floats
from llmd.sim import Job, Workload, workloads

DATA = Path(__file__).parents[1] / "tests" / "data"
BLOCK_TOKENS = 64
DRAINED_S = 400.0
"""Between two stages; each was let run out."""
SCRAPED_S = 0.5
"""Between two looks at the engines' gauges, in which the scorers believe: with it
load scheduling has the published times to first token below its knee, as whoever
looks emptiest gets all that comes until the next look."""
OPEN = 1024
"""Requests that are open at most, Envoy's default; others are refused at once.  From
40 a second on 1,500 are sent within the time of an answer, and no more than that is
answered: the report's charts have some 85 waiting and 40 running in each pod when all
are sent, nothing is sent after that, and stages begin 200 s apart, which is 1,000
answers at the published tokens a second."""
PREFILL_PACE = 1.1
"""Of published peaks: with it random scheduling has the published times to first
token at 3 and 10 requests a second, and the 0.23 s that are not modelled."""
SHARED_READ = 0.57
"""As of `Machine`: with it precise scheduling has the published mean gaps above 15
requests a second, where five users' requests read one group's prefix."""
RETOKENISED = 1.053
"""Prompts are texts of random tokens, and more tokens when they are read again: in
the report's charts of its pods, KV usage rises from 0 by 2.48 % for each request
alone with its group, 119 blocks of 4,802, and 113 would hold what was asked for."""


class ScrapedQueue(llmd.QueueDepth):
    """llm-d's queue-scorer: of the engine's gauge, however old."""

    def signal(self, request: llmd.Request, view: llmd.View) -> Floats:
        return np.nan_to_num(view.workers.reported_waiting)


class ScrapedUsage(llmd.KVHeadroom):
    """llm-d's kv-cache-scorer, likewise."""

    def signal(self, request: llmd.Request, view: llmd.View) -> Floats:
        return np.nan_to_num(view.workers.reported_kv_usage)


class Head(llmd.PrefixOverlap):
    """llm-d's approximate prefix-cache-scorer: of the first 256 blocks.

    They have 64 characters, some 16 tokens: less than the groups' prefix.
    """

    tokens = 256 * 16

    def signal(self, request: llmd.Request, view: llmd.View) -> Floats:
        held = view.cached_tokens(request)[:, llmd.Tier.GPU]
        most = min(request.prompt_tokens, self.tokens)
        return np.minimum(held, most) / most


class Tracked(llmd.PrefixOverlap):
    """llm-d's precise prefix-cache-scorer as it was then: of who holds anything.

    The longest counts 1 and the shortest 0, or all 1 if they are equal
    (llm-d-inference-scheduler v0.2.1, `scorer/utils.go`).
    """

    def rate(self, signal: Floats) -> Floats:
        found = signal > 0
        low = signal.min(where=found, initial=np.inf)
        high = signal.max(initial=0.0)
        return np.where(found, 1.0 if low >= high else (signal - low) / (high - low), 0)


class Heard(llmd.ExactIndex):
    """llm-d's index: of what engines have told, and not of what is on its way."""

    def expect(self, worker: llmd.WorkerId, request: llmd.Request, at: float) -> None:
        pass


class Remembered(llmd.GuessedIndex):
    """Its memory: 31,250 such blocks of each server, whatever that holds."""

    def __init__(self) -> None:
        super().__init__(ttl=math.inf)

    def join(self, worker: llmd.Worker, at: float) -> None:
        blocks = 31_250 * 16 // worker.block_tokens
        super().join(attrs.evolve(worker, kv_blocks=blocks), at)

    def sent(self, worker: llmd.WorkerId, names: list[int], at: float) -> None:
        super().sent(worker, names[: Head.tokens // BLOCK_TOKENS], at)


LOAD = ScrapedUsage() + ScrapedQueue()
Policy = tuple[llmd.Router, Callable[[], llmd.PrefixIndex]]


@attrs.frozen(kw_only=True)
class Gaps:
    """Between the tokens of a request, as published: with few others, and with many.

    Attributes:
        requests: Of `tokens` each, halfway through their answers, at the lowest rate.
        seconds: Their gap.
        full_s: With caches full of running requests, as under random scheduling
            above its knee: nine in ten are within it.
    """

    requests: float
    tokens: int
    seconds: float
    full_s: float


@attrs.frozen(kw_only=True)
class Ladder:
    """A benchmark: one load after the other, each let run out, measured once.

    Attributes:
        name: Of the file with what was measured, in `DATA`.
        policies: Scorers and index of each.
        warm_up: Requests a second, and for how long.
        stages: Seconds of each load, by its requests a second.
        full: Requests a second from which random and load scheduling keep up no more.
        even: Arrivals are; they are Poisson otherwise.
        groups: Of users, with a system prompt each.
        users: In each, with a question each.
        system_tokens: As asked for.
        question_tokens: As asked for.
        pods: How many.
        kv_tokens: That the cache of each holds.
        gpus: Of each.
        shape: Of the model.
        gaps: The only figures that its machine takes from what was measured.
    """

    name: str
    policies: Mapping[str, Policy]
    warm_up: tuple[int, int]
    stages: Mapping[int, int]
    full: int
    even: bool = False
    groups: int
    users: int
    system_tokens: int
    question_tokens: int
    pods: int
    kv_tokens: int
    gpus: int
    shape: Shape
    gaps: Gaps

    def machine(self) -> Machine:
        """Return a pod's: published peaks, a floor and a pace of attention by `gaps`.

        Prompts take `PREFILL_PACE` times as long as by peaks.
        """
        together = attrs.evolve(
            H100,
            name=f"h100-x{self.gpus}",
            memory_bytes_per_s=self.gpus * H100.memory_bytes_per_s,
            bf16_flops_per_s=self.gpus * H100.bf16_flops_per_s,
        )
        machine, gaps = Machine.of(together, self.shape), self.gaps
        few, full = gaps.requests * gaps.tokens, self.kv_tokens
        request_s = machine.decode_s_per_request
        more = full / gaps.tokens - gaps.requests
        token_s = (gaps.full_s - gaps.seconds - more * request_s) / (full - few)
        floor = gaps.seconds - few * token_s - gaps.requests * request_s
        return attrs.evolve(
            machine,
            decode_s_per_context_token=token_s,
            shared_read=SHARED_READ,
            decode_floor_s=floor,
            prefill_floor_s=floor,
            prefill_s_per_token=machine.prefill_s_per_token * PREFILL_PACE,
            attention_s_per_token2=machine.attention_s_per_token2 * PREFILL_PACE,
        )

    def load(self, seed: int) -> Workload:
        """Return the warm-up and all stages, each behind the last, which has drained.

        Answers take longer than a stage is sent, so who is refused is who comes last.
        """
        jobs: list[Job] = []
        at = 0.0
        for number, (rate, seconds) in enumerate([self.warm_up, *self.stages.items()]):
            stage = workloads.shared_prefix(
                rate=rate,
                requests=rate * seconds,
                groups=self.groups,
                users_per_group=self.users,
                system_tokens=round(self.system_tokens * RETOKENISED),
                question_tokens=round(self.question_tokens * RETOKENISED),
                in_rounds=True,
                burstiness=0.0 if self.even else 1.0,
                seed=seed,
            )
            for job in stage.jobs[:OPEN]:
                request = attrs.evolve(job.request, id=f"{number}/{job.id}")
                jobs.append(attrs.evolve(job, at=at + job.at, request=request))
            at += seconds + DRAINED_S
        return Workload(name=self.name, jobs=jobs)

    def measured(self) -> dict[str, Floats]:
        """Return what was published of each policy, shape (stages, 4).

        Output tokens a second, TTFT mean and p90 in seconds, milliseconds a token.
        """
        with (DATA / f"llmd_kvcache_{self.name}.csv").open() as file:
            table = [row for row in csv.DictReader(file) if row["qps_offered"] != "all"]
        at = {(row["policy"], int(float(row["qps_offered"]))): row for row in table}
        names = ("output_tok_s", "ttft_mean_s", "ttft_p90_s", "itl_mean_s")
        # It counts two chunks a token.
        scale = np.array([1.0, 1.0, 1.0, 2e3])
        return {
            policy: scale
            * np.array(
                [
                    [float(at[f"{policy}-scheduling", rate][name]) for name in names]
                    for rate in self.stages
                ]
            )
            for policy in self.policies
        }


FITTED = Ladder(
    name="73",
    policies={
        "precise": (3 * Tracked() + 2 * ScrapedUsage() + 2 * ScrapedQueue(), Heard),
        "estimated": (Head() + LOAD, Remembered),
        "load": (LOAD, llmd.ExactIndex),
        "random": (llmd.Random(), llmd.ExactIndex),
    },
    warm_up=(15, 50),
    stages={3: 20, 10: 20, 15: 20, 20: 38, 22: 34, 25: 30, 30: 25, 35: 21}
    | {40: 38, 43: 36, 46: 33, 49: 30, 52: 29, 55: 27, 57: 26, 60: 25},
    full=20,
    groups=150,
    users=5,
    system_tokens=6000,
    question_tokens=1200,
    pods=8,
    kv_tokens=307_328,
    gpus=2,
    shape=Shape(
        name="qwen3-32b",
        layers=64,
        hidden=5120,
        heads=64,
        kv_heads=8,
        head_dim=128,
        intermediate=25600,
        vocabulary=151936,
    ),
    gaps=Gaps(requests=8, tokens=8100, seconds=22e-3, full_s=36e-3),
)
HELD_OUT = Ladder(
    name="37",
    policies={
        "precise": (2 * Tracked() + LOAD, Heard),
        "default": (2 * Head() + LOAD, Remembered),
        "load": (LOAD, llmd.ExactIndex),
        "random": (llmd.Random(), llmd.ExactIndex),
    },
    warm_up=(9, 30),
    stages={3: 210, 4: 180, 5: 120, 6: 120, 8: 90, 10: 70, 12: 60, 15: 50, 20: 50},
    full=4,
    even=True,
    groups=83,
    users=3,
    system_tokens=8000,
    question_tokens=1000,
    pods=4,
    kv_tokens=461_376,
    gpus=4,
    shape=Shape(
        name="llama-3.1-70b",
        layers=80,
        hidden=8192,
        heads=64,
        kv_heads=8,
        head_dim=128,
        intermediate=28672,
        vocabulary=128256,
    ),
    # 3 a second for 26 s, 1,000 tokens, are 78 requests in four pods.
    gaps=Gaps(requests=19.5, tokens=9500, seconds=26e-3, full_s=37e-3),
)
LADDERS = {ladder.name: ladder for ladder in (FITTED, HELD_OUT)}
