"""Bands and fair orders in the simulator, against first come, first served."""

import attrs
import numpy as np
import pytest

import llmd
from llmd import balancer as b
from llmd.sim import EngineSettings, Job, Simulator, Workload, fleet, workloads
from llmd.sim.prompts import SegmentPrompt


def run(jobs, balancer, workers, until, kv_tokens=816_000, **settings):
    simulator = Simulator(
        llmd.Cluster(router=llmd.EarliestFirstToken(), balancer=balancer),
        settings=EngineSettings(**settings),
    )
    workload = Workload(name="made here", jobs=jobs)
    return simulator.run(workload, fleet(workers, kv_tokens=kv_tokens), until=until)


def p99_ttft(report, kind, after=0.0):
    picked = [id.startswith(kind) for id in report.ids]
    late = np.array(picked) & (report.arrived > after)
    return float(np.nanpercentile((report.first - report.arrived)[late], 99))


def throughput(report, kind, start, stop):
    ended = [
        end
        for id, end, status in zip(report.ids, report.ended, report.status, strict=True)
        if id.startswith(kind) and status == "completed" and start <= end < stop
    ]
    return len(ended) / (stop - start)


# Chat beside long documents ------------------------------------------------

WORKERS, SECONDS = 4, 40.0
ENGINE = {"step_tokens": 512, "by_priority": True, "report_tokens": 64}


def chat(rate):
    made = workloads.dialogue(rate=rate, requests=int(rate * SECONDS), think_s=5.0)
    return [
        attrs.evolve(
            job,
            request=attrs.evolve(job.request, id=f"chat{job.id}"),
            follows=job.follows and f"chat{job.follows}",
        )
        for job in made.jobs
    ]


def documents(rate):
    made = workloads.documents(rate=rate, requests=int(rate * SECONDS))
    return [
        attrs.evolve(job, request=attrs.evolve(job.request, priority=1))
        for job in made.jobs
    ]


def banded(spare=0.0):
    bands = [b.Band(name="chat"), b.Band(name="batch", ceiling=0.8, max_wait=60.0)]
    cap = b.LongPrefillCap(
        long_tokens=2000, spare=spare, of=lambda request: request.priority > 0
    )
    rooms = [b.FixedRoom(requests=128), cap]
    return b.FlowControl(b.Bands(bands, every=16), rooms=rooms)


def test_documents_leave_chat_alone_and_get_what_is_left():
    def alone(jobs, kind):
        report = run(jobs, banded(), WORKERS, SECONDS, **ENGINE)
        return throughput(report, kind, 10.0, SECONDS)

    most_documents = alone(documents(10.0 * WORKERS), "documents")
    # A saturated fleet of two answers 94 of this chat a second.
    most_chat = 47.0 * WORKERS
    # Short requests need 0.15 of the fleet, and 0.25 is kept free of documents.
    share = 0.15
    talk = chat(share * most_chat)
    quiet = p99_ttft(run(talk, banded(), WORKERS, SECONDS, **ENGINE), "chat")
    load = [*talk, *documents((1.2 - share) * most_documents)]
    mixed = run(load, banded(spare=0.25), WORKERS, SECONDS, **ENGINE)
    assert p99_ttft(mixed, "chat") <= 1.3 * quiet
    left = (1.0 - share) * most_documents
    assert throughput(mixed, "documents", 10.0, SECONDS) >= 0.9 * left
    fcfs = run(load, b.Fcfs(), WORKERS, SECONDS, **ENGINE)
    assert p99_ttft(fcfs, "chat") > 5 * quiet


# One tenant floods ----------------------------------------------------------


def tenant_jobs(tenant, rate, seconds, seed, documents=1, document=100, question=1500):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1.0 / rate, int(rate * seconds)))
    return [
        Job(
            request=llmd.Request(
                id=f"{tenant}-{row}",
                tenant=tenant,
                prompt=SegmentPrompt(
                    [
                        (1, 200),
                        (1000 * seed + int(rng.integers(documents)) + 2, document),
                        (int(rng.integers(1 << 40)), question),
                    ]
                ),
            ),
            output_tokens=10,
            at=float(at),
        )
        for row, at in enumerate(times)
    ]


def shared_out(order):
    rooms = [b.FixedRoom(requests=64, prefill_tokens=2048)]
    return b.FlowControl(order, rooms=rooms)


def dlpm():
    # Less than a request, so that one already moves a tenant behind the others.
    return b.Dlpm(quantum=512.0)


@pytest.mark.parametrize("make", [b.Vtc, dlpm])
def test_a_flood_hardly_reaches_the_others(make):
    # Twenty-four workers: the wait for the first of them to end its prefill,
    # which no order can avoid, is then small beside a prefill.
    seconds = 6.0
    others = [
        job
        for number in range(5)
        for job in tenant_jobs(f"other{number}", 32.0, seconds, number)
    ]
    flood = tenant_jobs("flood", 20 * 32.0, seconds, 99)

    def p99(jobs, order):
        return p99_ttft(run(jobs, shared_out(order), 24, seconds), "other", 2.0)

    quiet = p99(others, make())
    assert p99([*others, *flood], make()) <= 1.2 * quiet
    if make is b.Vtc:
        assert p99([*others, *flood], b.Fcfs()) > 5 * quiet


def test_dlpm_keeps_nine_tenths_of_the_hits_that_locality_alone_finds():
    seconds = 12.0

    def load(number, rate):
        shape = {"documents": 8, "document": 1500, "question": 150}
        return tenant_jobs(f"t{number}", rate, seconds, number, **shape)

    jobs = [job for number in range(12) for job in load(number, 8.0)]

    def hits(order):
        report = run(jobs, shared_out(order), 2, seconds, kv_tokens=24_000)
        done = ~np.isnan(report.first)
        return report.cached_tokens[done].sum() / report.prompt_tokens[done].sum()

    locality, fair, neither = (
        hits(order) for order in (b.Dlpm(quantum=1e15), dlpm(), b.Vtc())
    )
    assert fair >= 0.9 * locality
    assert neither < 0.7 * locality


def test_documents_make_place_for_chat_at_once_and_lose_nothing():
    bands = [b.Band(name="chat"), b.Band(name="batch", max_wait=60.0)]
    rooms = [b.FixedRoom(requests=64, prefill_tokens=4096)]
    talk, long = chat(16.0), documents(1.0)
    shed = [
        attrs.evolve(job, request=attrs.evolve(job.request, sheddable=True))
        for job in long
    ]

    def of(documents):
        order = b.FlowControl(b.Bands(bands, every=16), rooms=rooms)
        return run([*talk, *documents], order, 1, SECONDS, step_tokens=512)

    plain, yielding = of(long), of(shed)
    # Neither waits for its document to be computed, nor behind one that an index
    # still hoped to find where it was aborted.
    assert p99_ttft(yielding, "chat") <= 0.25 * p99_ttft(plain, "chat")
    # What had been computed of it waits in the engine's cache.
    both = [throughput(r, "documents", 0.0, SECONDS) for r in (plain, yielding)]
    assert both[1] >= 0.95 * both[0]
