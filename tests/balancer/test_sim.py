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


def ttfts(report, kind, after=0.0):
    """Times to first token of those that came *after*; endless of the unanswered."""
    picked = [id.startswith(kind) for id in report.ids]
    late = np.array(picked) & (report.arrived > after)
    times = (report.first - report.arrived)[late]
    return np.where(np.isnan(times), np.inf, times)


def p99(*times):
    return float(np.percentile(np.concatenate(times), 99, method="higher"))


def throughput(report, kind, start, stop):
    ended = [
        end
        for id, end, status in zip(report.ids, report.ended, report.status, strict=True)
        if id.startswith(kind) and status == "completed" and start <= end < stop
    ]
    return len(ended) / (stop - start)


# Chat beside long documents ------------------------------------------------

WORKERS, SECONDS, TAIL = 4, 80.0, 5.0
ENGINE = {"step_tokens": 512, "by_priority": True, "report_tokens": 64}


def chat(rate, seed=0, seconds=SECONDS):
    made = workloads.dialogue(
        rate=rate, requests=int(rate * seconds), think_s=5.0, seed=seed
    )
    return [
        attrs.evolve(
            job,
            request=attrs.evolve(job.request, id=f"chat{job.id}"),
            follows=job.follows and f"chat{job.follows}",
        )
        for job in made.jobs
    ]


def documents(rate, seed=0, seconds=SECONDS, sheddable=True):
    made = workloads.documents(rate=rate, requests=int(rate * seconds), seed=seed)
    return [
        attrs.evolve(
            job, request=attrs.evolve(job.request, priority=1, sheddable=sheddable)
        )
        for job in made.jobs
    ]


def banded(spare=0.0):
    bands = [b.Band(name="chat"), b.Band(name="batch", ceiling=0.8, max_wait=60.0)]
    cap = b.LongPrefillCap(
        long_tokens=600, spare=spare, of=lambda request: request.priority > 0
    )
    rooms = [b.FixedRoom(requests=128, prefill_tokens=4096), cap]
    return b.FlowControl(b.Bands(bands, every=32), rooms=rooms)


def test_documents_leave_chat_alone_and_get_what_is_left():
    """At 1.2 times what the fleet can do, for longer than documents may wait."""
    # A saturated fleet of two answers 94 of this chat a second.  Short requests
    # need 0.1 of the fleet, and 0.25 is kept free of documents.
    share, most_chat = 0.1, 47.0 * WORKERS
    quiet, mixed, part = [], [], []
    for seed in range(3):

        def played(jobs, spare=0.0, end=SECONDS + TAIL):
            return run(jobs, banded(spare), WORKERS, end, **ENGINE)

        def done(report):
            return throughput(report, "documents", 10.0, SECONDS)

        most_documents = done(played(documents(10.0 * WORKERS, seed)))
        talk = chat(share * most_chat, seed)
        load = [*talk, *documents((1.2 - share) * most_documents, seed)]
        both = played(load, spare=0.25)
        quiet.append(ttfts(played(talk), "chat"))
        mixed.append(ttfts(both, "chat"))
        part.append(done(both) / ((1.0 - share) * most_documents))
    assert p99(*mixed) <= 1.3 * p99(*quiet)
    assert np.mean(part) >= 0.9
    fcfs = run(load, b.Fcfs(), WORKERS, SECONDS + TAIL, **ENGINE)
    assert p99(ttfts(fcfs, "chat")) > 5 * p99(*quiet)


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


class FloodFirst(b.Fcfs):
    """What must be found out: the others wait until the flood is over."""

    def key(self, request, view):
        return request.tenant != "flood"


@pytest.mark.parametrize("make", [b.Vtc, b.Dlpm])
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

    def worst(jobs, order):
        report = run(jobs, shared_out(order), 24, seconds + 1.0)
        return p99(ttfts(report, "other", 2.0))

    quiet = worst(others, make())
    assert worst([*others, *flood], make()) <= 1.2 * quiet
    if make is b.Vtc:
        assert worst([*others, *flood], b.Fcfs()) > 5 * quiet
        assert worst([*others, *flood], FloodFirst()) == np.inf


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
        hits(order) for order in (b.Dlpm(quantum=1e15), b.Dlpm(), b.Vtc())
    )
    assert fair >= 0.9 * locality
    assert neither < 0.7 * locality


def test_documents_make_place_for_chat_at_once_and_lose_nothing():
    rooms = [b.FixedRoom(requests=64, prefill_tokens=4096)]
    seconds = 40.0
    talk = chat(16.0, seconds=seconds)

    def of(sheddable):
        long = documents(1.0, seconds=seconds, sheddable=sheddable)
        bands = [b.Band(name="chat"), b.Band(name="batch", max_wait=60.0)]
        order = b.FlowControl(b.Bands(bands, every=16), rooms=rooms)
        return run([*talk, *long], order, 1, seconds + TAIL, step_tokens=512)

    plain, yielding = of(False), of(True)
    # Neither waits for its document to be computed, nor behind one that an index
    # still hoped to find where it was aborted.
    assert p99(ttfts(yielding, "chat")) <= 0.25 * p99(ttfts(plain, "chat"))
    # What had been computed of it waits in the engine's cache.
    both = [throughput(r, "documents", 0.0, seconds) for r in (plain, yielding)]
    assert both[1] >= 0.95 * both[0]
