"""A server books, streams, retries and releases on every way out."""

import asyncio
import contextlib

import attrs
import numpy as np
import pytest

import llmd
from llmd import errors
from llmd.balancer import FlowControl, SlowStart
from llmd.live import Promise, Server


def request(id="r", prompt=(7, 8, 9), **more):
    return llmd.Request(id=id, prompt=prompt, **more)


async def collect(server, request, sampling=None):
    return [t async for o in server.generate(request, sampling) for t in o.token_ids]


def booked(server):
    workers = server.cluster.view.workers
    columns = (
        workers.running_requests,
        workers.waiting_requests,
        workers.prefill_tokens,
        workers.context_tokens,
    )
    return sum(int(column.sum()) for column in columns) + len(server._tickets)


async def test_streams_and_releases(make_engine):
    async with Server() as server:
        await server.add(make_engine())
        assert await collect(server, request(max_new_tokens=4)) == [7] * 4
        assert booked(server) == 0


async def test_an_abandoned_answer_frees_its_place_at_once(make_engine):
    engine = make_engine()
    async with Server() as server:
        await server.add(engine)
        answer = server.generate(request(max_new_tokens=500))
        await anext(answer)
        assert booked(server) > 0
        closing = asyncio.ensure_future(answer.aclose())
        await asyncio.sleep(0)
        assert booked(server) == 0
        await closing
        await asyncio.sleep(0.01)
        assert not engine.running


async def test_a_cancelled_task_frees_its_place(make_engine):
    async with Server() as server:
        await server.add(make_engine())
        task = asyncio.create_task(collect(server, request(max_new_tokens=500)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert booked(server) == 0


@pytest.mark.parametrize("fault", ["error", "bug", "die"])
async def test_an_unstreamed_request_goes_on_elsewhere(make_engine, fault):
    bad, good = make_engine(fault=fault), make_engine()
    async with Server() as server:
        await server.add(bad, "a")
        await server.add(good, "b")
        server.cluster.router = Prefer("a")
        tokens = await collect(server, request(max_new_tokens=3))
        assert tokens == [7] * 3
        assert [len(bad.calls), len(good.calls)] == [1, 1]
        assert booked(server) == 0
        assert ("a" in server.engines) == (fault != "die")


class Prefer(llmd.Router):
    """Sends the first request to one worker and everything after elsewhere."""

    def __init__(self, worker):
        self.worker, self.asked = worker, 0

    def cost(self, request, view):
        self.asked += 1
        likes = self.asked == 1
        return np.array([float((w == self.worker) != likes) for w in view.workers.ids])


@pytest.mark.parametrize(
    ("fault", "error"), [("error", errors.EngineError), ("die", errors.WorkerLost)]
)
async def test_a_streamed_request_fails_clearly(make_engine, fault, error):
    async with Server() as server:
        await server.add(make_engine(fault=fault, after=2), "a")
        await server.add(make_engine(), "b")
        server.cluster.router = Prefer("a")
        seen = []

        async def read():
            async for output in server.generate(request(max_new_tokens=9)):
                seen.extend(output.token_ids)

        with pytest.raises(error):
            await read()
        assert seen == [7, 7]
        assert booked(server) == 0


@pytest.mark.parametrize("fault", ["error", "die"])
async def test_what_can_be_resumed_goes_on_elsewhere(make_engine, fault):
    bad, good = make_engine(fault=fault, after=2), make_engine()
    async with Server() as server:
        await server.add(bad, "a")
        await server.add(good, "b")
        server.cluster.router = Prefer("a")
        asked = request(max_new_tokens=9, resumable=True)
        assert await collect(server, asked) == [7] * 9
        (call,) = good.calls
        assert call.request.prompt_tokens == asked.prompt_tokens + 2
        assert call.request.max_new_tokens == 7
        assert call.request.id == asked.id
        assert booked(server) == 0


async def test_what_an_engine_hides_cannot_be_resumed(make_engine):
    class Hiding(type(make_engine())):
        async def generate(self, call):
            async for output in super().generate(call):
                yield attrs.evolve(output, token_ids=(), text="word ")

    async with Server() as server:
        await server.add(Hiding(fault="die", after=2), "a")
        await server.add(make_engine(), "b")
        server.cluster.router = Prefer("a")
        with pytest.raises(errors.WorkerLost):
            await collect(server, request(max_new_tokens=9, resumable=True))
        await asyncio.sleep(0.05)
        assert booked(server) == 0


async def test_gives_up_after_the_last_attempt(make_engine):
    async with Server() as server:
        await server.add(make_engine(fault="error"))
        with pytest.raises(errors.EngineError, match="out of luck"):
            await collect(server, request())
        assert booked(server) == 0


async def test_an_engine_that_dies_idle_leaves(make_engine):
    engine = make_engine()
    async with Server() as server:
        await server.add(engine)
        engine.die()
        await asyncio.sleep(0.01)
        assert not server.engines
        assert not engine.started
        assert len(server.cluster.view.workers) == 0


async def test_a_hung_engine_meets_the_deadline(make_engine):
    async with Server(tick=0.01) as server:
        await server.add(make_engine(fault="hang"))
        late = request(deadline=server.clock() + 0.05)
        with pytest.raises(errors.DeadlineExceeded, match="ran past"):
            await collect(server, late)
        assert booked(server) == 0


async def test_a_waiting_request_meets_its_deadline(make_engine):
    async with Server(tick=0.01) as server:
        late = request(deadline=server.clock() + 0.05)
        with pytest.raises(errors.DeadlineExceeded, match="waited"):
            await collect(server, late)
        assert booked(server) == 0


async def test_a_room_that_time_opens_is_seen_when_it_opens(make_engine):
    silent = make_engine()
    room = SlowStart(ramp=5.0, first=1)
    cluster = llmd.Cluster(balancer=FlowControl(rooms=[room]))
    async with Server(cluster, tick=60.0) as server, asyncio.timeout(10):
        await server.add(silent)
        silent.pace = 60.0
        asking = [asyncio.create_task(collect(server, request(id))) for id in "abc"]
        while len(silent.calls) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


async def test_waits_for_the_first_worker(make_engine):
    async with Server() as server:
        answer = asyncio.create_task(collect(server, request()))
        await asyncio.sleep(0.01)
        assert not answer.done()
        await server.add(make_engine())
        assert await answer == [7] * 5


async def test_an_engine_that_cannot_start_leaves_no_trace(make_engine):
    async with Server() as server:
        with pytest.raises(errors.EngineError, match="no such model"):
            await server.add(make_engine(fault="start"))
        assert not server.engines
        assert len(server.cluster.view.workers) == 0


async def test_removal_drains(make_engine):
    slow = make_engine(pace=0.01)
    async with Server() as server:
        await server.add(slow, "slow")
        answer = asyncio.create_task(collect(server, request()))
        await asyncio.sleep(0.005)
        removal = asyncio.create_task(server.remove("slow"))
        await asyncio.sleep(0)
        second = asyncio.create_task(collect(server, request("second")))
        await server.add(make_engine(), "quick")
        assert await second == [7] * 5
        assert len(slow.calls) == 1
        assert await answer == [7] * 5
        await removal
        assert set(server.engines) == {"quick"}
        with pytest.raises(errors.UnknownWorker):
            await server.remove("slow")


async def test_models_come_and_go(make_engine):
    async with Server() as server:
        await server.add(make_engine(models=("big",)), "a")
        with pytest.raises(errors.UnknownModel, match="small"):
            await collect(server, request(model="small"))
        server.add_model("small")
        answer = asyncio.create_task(collect(server, request(model="small")))
        await asyncio.sleep(0.01)
        await server.add(make_engine(models=("small",)), "b")
        assert await answer == [7] * 5
        await server.remove("b")
        waiting = asyncio.create_task(collect(server, request(model="small")))
        await asyncio.sleep(0.01)
        server.remove_model("small")
        with pytest.raises(errors.UnknownModel, match="removed"):
            await waiting
        assert booked(server) == 0


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (lambda: request(prompt=()), errors.EmptyPrompt),
        (lambda: request(max_new_tokens=-1), errors.InvalidRequest),
        (lambda: request(max_new_tokens=10**9), errors.PromptTooLong),
        (lambda: request(prompt=range(1001)), errors.PromptTooLong),
        (lambda: request(lora="none"), errors.UnknownAdapter),
        (lambda: request(id=""), errors.InvalidRequest),
        (lambda: request(prompt=[1, -2]), errors.InvalidRequest),
        (lambda: request(prompt=["a"]), errors.InvalidRequest),
    ],
)
async def test_bad_requests_book_nothing(make_engine, bad, error):
    async with Server() as server:
        await server.add(make_engine())
        with pytest.raises(error):
            await collect(server, bad())
        assert booked(server) == 0


async def test_a_used_id_hurts_only_the_second(make_engine):
    async with Server() as server:
        await server.add(make_engine())
        first = asyncio.create_task(collect(server, request()))
        await asyncio.sleep(0)
        with pytest.raises(errors.DuplicateRequest):
            await collect(server, request())
        assert await first == [7] * 5


class Broken(llmd.Router):
    def __init__(self, answer):
        self.answer = answer

    def cost(self, request, view):
        return self.answer(view)


@pytest.mark.parametrize(
    "answer",
    [
        lambda view: np.full(len(view.workers), np.nan),
        lambda view: np.zeros(len(view.workers) + 1),
        lambda view: 1 / 0,
    ],
)
async def test_a_broken_policy_fails_its_request_alone(make_engine, answer):
    async with Server(llmd.Cluster(router=Broken(answer))) as server:
        await server.add(make_engine())
        with pytest.raises(errors.PolicyError):
            await collect(server, request())
        assert booked(server) == 0
        server.cluster.router = llmd.RoundRobin()
        assert await collect(server, request()) == [7] * 5


class Failing(llmd.Autoscaler):
    def wanted(self, view):
        raise RuntimeError(f"no answer at {view.now}")


async def test_a_policy_that_fails_on_every_tick_is_logged_once(make_engine, caplog):
    policy = Failing(max_workers=2)
    async with Server(llmd.Cluster(autoscaler=policy), tick=0.001) as server:
        await server.add(make_engine())
        async with asyncio.timeout(10):
            while server.counts["policy_errors"] < 5:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert caplog.text.count("a policy failed on a tick") == 1


async def test_bad_sampling_is_not_retried(make_engine):
    engine = make_engine(fault="invalid")
    async with Server() as server:
        await server.add(engine)
        with pytest.raises(errors.InvalidRequest, match="temperature"):
            await collect(server, request())
        assert len(engine.calls) == 1
        assert booked(server) == 0


async def test_a_rejection_names_its_reason(make_engine):
    cluster = llmd.Cluster(balancer=llmd.Fcfs(max_waiting=1))
    async with Server(cluster) as server:
        waiting = asyncio.create_task(collect(server, request("a")))
        await asyncio.sleep(0)
        with pytest.raises(errors.Rejected, match="wait already"):
            await collect(server, request("b"))
        await server.add(make_engine())
        assert await waiting == [7] * 5


class Split(llmd.Router):
    def cost(self, request, view):
        return np.zeros(len(view.workers))

    def route(self, request, view):
        return llmd.Decision(decode="d", prefill="p")


@pytest.mark.parametrize("fault", ["", "error", "die", "hang"])
async def test_prefill_elsewhere_or_not_at_all(make_engine, fault):
    prefill, decode = make_engine(fault=fault), make_engine()
    server = Server(llmd.Cluster(router=Split()), prefill_timeout=0.1)
    async with server:
        await server.add(prefill, "p")
        await server.add(decode, "d")
        assert await collect(server, request(max_new_tokens=3)) == [7] * 3
        assert prefill.calls[0].prefill_only
        handed = decode.calls[-1].kv_transfer
        assert handed == (None if fault else {"from": "here"})
        assert server.counts["prefill_failures"] == bool(fault)
        assert booked(server) == 0


def promising(engine):
    engine.promise = lambda request: Promise(prefill={"to": "d"}, decode={"of": "p"})
    return engine


@pytest.mark.parametrize("fault", ["", "error", "die", "hang"])
async def test_a_promised_prompt_is_waited_for_where_it_is_decoded(make_engine, fault):
    prefill, decode = promising(make_engine(fault=fault)), make_engine()
    server = Server(llmd.Cluster(router=Split()), prefill_timeout=0.1)
    async with server:
        await server.add(prefill, "p")
        await server.add(decode, "d")
        assert await collect(server, request(max_new_tokens=30)) == [7] * 30
        assert prefill.calls[0].prefill_only
        assert prefill.calls[0].kv_transfer == {"to": "d"}
        assert decode.calls[0].kv_transfer == {"of": "p"}
        assert not prefill.running
        assert booked(server) == 0


async def test_a_promise_that_nobody_waits_for_any_more_is_aborted(make_engine):
    prefill, decode = promising(make_engine(fault="hang")), make_engine()
    async with Server(llmd.Cluster(router=Split())) as server:
        await server.add(prefill, "p")
        await server.add(decode, "d")
        stream = server.generate(request(max_new_tokens=900))
        await anext(stream)
        assert prefill.running
        await stream.aclose()
        assert not prefill.running
        assert not decode.running
        assert booked(server) == 0


async def test_closing_fails_what_is_in_flight(make_engine):
    engine = make_engine(fault="hang")
    server = Server()
    async with server:
        await server.add(engine)
        answer = asyncio.create_task(collect(server, request()))
        await asyncio.sleep(0.01)
    with pytest.raises(errors.WorkerLost, match="closed"):
        await answer
    assert not engine.started
    await server.close()


async def test_a_lease_books_and_releases(make_engine):
    async with Server() as server:
        await server.add(make_engine(), "a")
        async with server.lease(request()) as lease:
            assert lease.worker == "a"
            assert lease.engine is server.engine("a")
            assert booked(server) > 0
            lease.first_token(cached_tokens=0)
            lease.generated(3)
            assert server.cluster.view.workers.context_tokens.tolist() == [7]
        assert booked(server) == 0


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, TimeoutError])
async def test_a_lease_releases_on_every_error(make_engine, error):
    async with Server() as server:
        await server.add(make_engine())
        with pytest.raises(error):
            async with server.lease(request()):
                raise error
        assert booked(server) == 0


async def test_a_lease_cancelled_while_waiting_leaves_nothing():
    async with Server() as server:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.02), server.lease(request()):
                pytest.fail("there is no worker")
        assert booked(server) == 0


async def test_a_lost_worker_ends_its_leases(make_engine):
    engine = make_engine()
    async with Server() as server:
        await server.add(engine, "a")
        await server.add(make_engine(), "b")
        server.cluster.router = Prefer("a")
        async with server.lease(request()) as lease:
            engine.die()
            await asyncio.sleep(0.02)
            assert lease.lost
            assert booked(server) == 0
            lease.first_token()
        assert booked(server) == 0


async def test_ten_thousand_cancels_leak_nothing(make_engine):
    rng = np.random.default_rng(0)
    cluster = llmd.Cluster(balancer=llmd.Fcfs(max_running=20))
    async with Server(cluster) as server:
        for _ in range(3):
            await server.add(make_engine(pace=0.0))

        async def client(number):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.exponential(0.01)):
                    await collect(server, request(f"r{number}", max_new_tokens=20))

        for batch in range(0, 10_000, 500):
            await asyncio.gather(*map(client, range(batch, batch + 500)))
        await asyncio.sleep(0.05)
        assert booked(server) == 0
        assert not any(engine.running for engine in server.engines.values())
        assert not server._errands


async def test_an_engine_that_fails_fast_does_not_swallow_the_fleet(make_engine):
    """It looks idle, so that routers send it everything, but no retry as well."""
    async with Server() as server:
        await server.add(make_engine(fault="error"), "broken")
        await server.add(make_engine(pace=0.002), "sound")
        answers = await asyncio.gather(
            *(collect(server, request(f"r{n}", max_new_tokens=3)) for n in range(50))
        )
        assert answers == [[7] * 3] * 50
        assert booked(server) == 0


async def test_a_worker_is_of_the_machine_that_was_named_for_it(make_engine):
    async with Server() as server:
        worker = llmd.Worker(id="w", machine="h200")
        await server.add(make_engine(), "w", expected=worker)
        (facts,) = server.cluster.view.workers.facts
        assert facts.machine == "h200"
        assert facts.max_model_tokens == 1000  # what the engine says of itself
