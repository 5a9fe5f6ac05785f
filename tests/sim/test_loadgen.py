"""The load generator on an engine of known pace; `tests/vllm` has real ones."""

import asyncio

import attrs
import numpy as np
import pytest

import llmd
from llmd.live import Call, Engine, Output, Server
from llmd.loadgen import LoadGenerator, ScheduleLag
from llmd.router import Disaggregated
from llmd.sim import plots, workloads
from llmd.sim.benchmark_report import benchmark_report
from llmd.sim.prompts import SegmentPrompt, tokens_of


@attrs.define(eq=False)
class PacedEngine(Engine):
    """Answers after *first* seconds, a token each *pace* seconds."""

    first: float = 0.2
    pace: float = 0.005
    prompts: dict = attrs.field(factory=dict)

    async def start(self, worker, report, progress):
        return llmd.Worker(id=worker)

    async def generate(self, call):
        self.prompts[call.request.id] = call.request.prompt.ids
        await asyncio.sleep(self.first)
        wanted = call.request.max_new_tokens
        for position in range(wanted):
            if position:
                await asyncio.sleep(self.pace)
            last = position == wanted - 1
            yield Output(
                token_ids=(9,),
                finish_reason="length" if last else None,
                cached_tokens=7,
            )

    async def abort(self, request_id): ...

    async def stop(self): ...


async def drive(load, engine=None, **options):
    engine = engine or PacedEngine()
    options = {"most_lag": np.inf} | options  # a busy machine is no failure here
    async with Server(llmd.Cluster(router=llmd.LeastLoaded())) as server:
        for worker in ("a", "b"):
            await server.add(engine, worker)
        generator = LoadGenerator(server, **options)
        return await generator.run(load), generator, engine


LOAD = workloads.dialogue(
    rate=40.0, requests=30, turns=3.0, answer_tokens=6, think_s=0.05, seed=1
)


async def test_all_is_answered_and_measured_from_when_it_was_due():
    report, generator, _ = await drive(LOAD)
    assert report.completed == 30
    assert report.output_tokens.sum() == LOAD.output_tokens
    assert (report.ttfts >= 0.2).all()
    assert (report.cached_tokens == 7).all()
    assert set(report.worker) == {"a", "b"}
    assert len(generator.lags) == 30
    assert report.itl(50) >= 0.005
    assert report.policy == "LeastLoaded"
    jobs = {job.id: job for job in LOAD.jobs}
    rows = {id: row for row, id in enumerate(report.ids)}
    for id, row in rows.items():
        if jobs[id].follows:
            before = report.ended[rows[jobs[id].follows]]
            assert report.arrived[row] == pytest.approx(before + jobs[id].think_s)


async def test_deadlines_are_told_by_the_clock_of_the_server():
    jobs = [
        attrs.evolve(job, request=attrs.evolve(job.request, deadline=job.at + 5.0))
        for job in workloads.batch(rate=40, requests=8, answer_tokens=4).jobs
    ]
    load = attrs.evolve(LOAD, jobs=jobs)
    report, *_ = await drive(load)
    assert report.completed == 8
    late = [
        attrs.evolve(job, request=attrs.evolve(job.request, deadline=job.at + 0.1))
        for job in jobs
    ]
    report, *_ = await drive(attrs.evolve(load, jobs=late))
    assert all("DeadlineExceeded" in status for status in report.status)


class Handing(PacedEngine):
    """Hands prompts over, of which it found 7 tokens, or takes all of them."""

    async def start(self, worker, report, progress):
        role = llmd.Role.PREFILL if worker == "a" else llmd.Role.DECODE
        return llmd.Worker(id=worker, role=role)

    async def generate(self, call):
        found = 7 if call.prefill_only else call.request.prompt_tokens - 1
        yield Output(
            token_ids=(9,) * call.request.max_new_tokens,
            finish_reason="length",
            cached_tokens=found,
            kv_transfer={"some": "where"},
        )


async def test_kv_that_was_handed_over_is_no_hit():
    load = workloads.batch(rate=100, requests=6, answer_tokens=4)
    router = Disaggregated(
        prefill=llmd.LeastLoaded(), decode=llmd.LeastLoaded(), min_uncached_tokens=1
    )
    async with Server(llmd.Cluster(router=router)) as server:
        for worker in "ab":
            await server.add(Handing(), worker)
        report = await LoadGenerator(server, most_lag=np.inf).run(load)
    assert report.completed == 6
    assert list(report.cached_tokens) == [7] * 6


async def test_a_next_turn_carries_the_answer_that_was_given():
    _, _, engine = await drive(LOAD)
    jobs = {job.id: job for job in LOAD.jobs}
    followers = [job for job in LOAD.jobs if job.follows]
    assert followers
    for job in followers:
        past = jobs[job.follows]
        end, size = past.answer.tokens, past.output_tokens
        assert (engine.prompts[job.id][end - size : end] == 9).all()
        before = engine.prompts[job.follows]
        assert (engine.prompts[job.id][: len(before)] == before).all()


async def test_a_generator_that_is_late_refuses_to_report():
    ticks = iter(np.arange(0.0, 1e6, 0.5))
    with pytest.raises(ScheduleLag, match="late"):
        await drive(
            workloads.batch(requests=5, rate=1e3, answer_tokens=3, burstiness=0.0),
            engine=PacedEngine(first=0.0, pace=0.0),
            clock=lambda: float(next(ticks)),
            most_lag=0.05,
        )


async def test_nothing_is_sent_early_and_little_later_than_the_clock_can_tell():
    ticks = iter(np.arange(0.0, 1e3, 5e-5))
    load = workloads.batch(requests=6, rate=100.0, answer_tokens=2)
    _, generator, _ = await drive(load, clock=lambda: float(next(ticks)))
    assert min(generator.lags) >= 0.0
    assert max(generator.lags) < 1e-3  # a timer of asyncio is that late by itself


async def test_who_is_given_up_counts_as_a_miss():
    load = workloads.batch(requests=4, rate=100.0, answer_tokens=3)
    report, _, _ = await drive(load, engine=PacedEngine(first=5.0), deadline_s=0.2)
    assert report.completed == 0
    assert set(report.status) == {"cancelled"}


def test_made_up_tokens_share_what_their_names_share():
    one = tokens_of(llmd.Prompt.named([1, 2, 3], 512, 1700))
    two = tokens_of(llmd.Prompt.named([1, 2, 4], 512, 1600))
    assert (len(one), len(two)) == (1700, 1600)
    assert (one[:1024] == two[:1024]).all()
    assert (one[1024:1536] == two[1024:1536]).mean() < 0.01
    real = tokens_of(SegmentPrompt([(1, 10), (2, 20)]), vocabulary=100)
    assert real.max() < 100


@attrs.define(eq=False)
class FailingEngine(PacedEngine):
    """Raises, or answers nothing, by request."""

    async def generate(self, call):
        number = int(call.request.id.removeprefix("batch"))
        if number == 0:
            raise OSError("no route to the engine")
        if number == 1:
            raise TimeoutError("connect timed out")
        if number == 2:
            return
        async for output in PacedEngine.generate(self, call):
            yield output


@attrs.define(eq=False)
class Direct:
    """A fleet of one engine with nothing between."""

    engine: FailingEngine
    cluster: llmd.Cluster

    async def generate(self, request, sampling=None):
        async for output in self.engine.generate(Call(request=request, sampling={})):
            yield output


async def test_one_that_fails_is_told_and_the_others_are_measured():
    load = workloads.batch(requests=6, rate=100.0, answer_tokens=3)
    fleet = Direct(FailingEngine(first=0.0), llmd.Cluster())
    report = await LoadGenerator(fleet, most_lag=np.inf).run(load)
    status = dict(zip(report.ids, report.status, strict=True))
    assert status["batch0"] == "OSError: no route to the engine"
    assert status["batch1"] == "TimeoutError: connect timed out"
    assert status["batch2"] == "no token came"
    assert report.completed == 3


async def test_a_report_of_real_engines_invents_nothing_of_them():
    report, _, _ = await drive(LOAD)
    document = benchmark_report(report)
    assert "kv_cache_usage" not in str(document)
    assert "preemptions" not in str(document)
    pytest.importorskip("matplotlib")
    figure = plots.gantt(report)
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert max(heights) <= 0.9 + 1e-9
