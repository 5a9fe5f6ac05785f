"""Urgent work takes the place of sheddable work, whose client sees one answer."""

import asyncio

import llmd
from llmd import balancer as b
from llmd.live import Server


async def answer(server, id, done, tokens=3, **fields):
    asked = llmd.Request(id=id, prompt=[7, 8], max_new_tokens=tokens, **fields)
    tokens = [t async for o in server.generate(asked) for t in o.token_ids]
    done.append(id)
    return tokens


async def test_a_shed_request_is_answered_once_and_in_full(make_engine):
    balancer = b.FlowControl(b.Bands([b.Fcfs(), b.Fcfs()]), rooms=[b.FixedRoom(1)])
    engine, done = make_engine(pace=0.05), []
    async with Server(llmd.Cluster(balancer=balancer)) as server:
        await server.add(engine)
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            batch = group.create_task(
                answer(server, "batch", done, priority=1, sheddable=True)
            )
            await asyncio.sleep(0.01)
            assert server.cluster.runs("batch")
            chat = group.create_task(answer(server, "chat", done, priority=0))
        assert done == ["chat", "batch"]
        assert chat.result() == batch.result() == [7] * 3
        assert [call.request.id for call in engine.calls] == ["batch", "chat", "batch"]
        assert server.counts["requeued"] == 1
        assert not engine.running
        assert not server.cluster.view.workers.running_requests.any()


async def test_what_streamed_is_never_shed(make_engine):
    balancer = b.FlowControl(b.Bands([b.Fcfs(), b.Fcfs()]), rooms=[b.FixedRoom(1)])
    engine, done = make_engine(pace=0.02), []
    async with Server(llmd.Cluster(balancer=balancer)) as server:
        await server.add(engine)
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            group.create_task(answer(server, "batch", done, priority=1, sheddable=True))
            while not engine.running or not server.cluster.books.get("batch").streamed:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            group.create_task(answer(server, "chat", done, priority=0))
        assert done == ["batch", "chat"]
        assert [call.request.id for call in engine.calls] == ["batch", "chat"]


async def test_what_can_be_resumed_is_shed_in_mid_answer_and_goes_on(make_engine):
    """Nothing is said twice: what was said is prompt to the second call."""
    balancer = b.FlowControl(b.Bands([b.Fcfs(), b.Fcfs()]), rooms=[b.FixedRoom(1)])
    engine, done = make_engine(pace=0.02), []
    async with Server(llmd.Cluster(balancer=balancer)) as server:
        await server.add(engine)
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            more = {"sheddable": True, "resumable": True}
            batch = group.create_task(
                answer(server, "batch", done, tokens=9, priority=1, **more)
            )
            while not (on := server.cluster.books.get("batch")) or not on.streamed:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            chat = group.create_task(answer(server, "chat", done))
        assert done == ["chat", "batch"]
        assert [call.request.id for call in engine.calls] == ["batch", "chat", "batch"]
        rest = engine.calls[2].request
        said = rest.prompt_tokens - 2
        assert said >= 1
        assert rest.prompt.ids.tolist() == [7, 8] + [7] * said
        assert rest.max_new_tokens == 9 - said
        assert batch.result() == [7] * 9
        assert chat.result() == [7] * 3
        assert not server.cluster.view.workers.loads.any()
