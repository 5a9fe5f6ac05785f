"""Load booked by other routers counts, once, for a while, and never twice."""

import asyncio
import time

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import llmd
from llmd import events as e
from llmd.types import Load

COLUMNS = ("running_requests", "waiting_requests", "prefill_tokens", "context_tokens")


def cluster(workers=2):
    made = llmd.Cluster(llmd.LeastLoaded())
    for number in range(workers):
        made.handle(e.WorkerJoined(0.0, llmd.Worker(id=f"w{number}")))
    return made


def seen(made, worker="w0"):
    row = made.view.workers.ids.index(worker)
    return Load(*(int(getattr(made.view.workers, name)[row]) for name in COLUMNS))


def test_a_router_avoids_what_a_peer_loaded():
    made = cluster()
    made.handle(e.PeerReported(1.0, "p", 1, {"w0": Load(5, 0, 0, 500)}))
    for number in range(4):
        request = llmd.Request(id=f"r{number}", prompt=[1, 2])
        (sent,) = made.handle(e.RequestArrived(1.0, request))
        assert sent.decision.decode == "w1"
    assert made.peers.own() == {"w1": Load(4, 4, 8, 8)}


def test_it_is_forgotten_when_the_peer_falls_silent():
    made = cluster()
    made.handle(e.PeerReported(1.0, "p", 1, {"w0": Load(5, 5, 100, 100)}, valid_s=2.0))
    made.handle(e.Tick(2.9))
    assert seen(made) == Load(5, 5, 100, 100)
    made.handle(e.Tick(3.0))
    assert seen(made) == Load()


def test_a_worker_that_joins_later_shows_what_is_known_of_it():
    made = cluster(1)
    made.handle(e.PeerReported(1.0, "p", 1, {"w1": Load(3, 0, 0, 30)}))
    made.handle(e.WorkerJoined(1.0, llmd.Worker(id="w1")))
    assert seen(made, "w1") == Load(3, 0, 0, 30)
    made.handle(e.WorkerLeft(1.5, "w1"))
    made.handle(e.PeerReported(1.6, "p", 2, {}))
    assert seen(made) == Load()


REPORTS = st.lists(
    st.tuples(
        st.sampled_from("pq"),
        st.integers(1, 6),
        st.dictionaries(
            st.sampled_from(["w0", "w1", "gone"]),
            st.builds(Load, *[st.integers(0, 9)] * 4),
        ),
    ),
    max_size=12,
)


@settings(max_examples=100, deadline=None)
@given(reports=REPORTS, own=st.integers(0, 3))
def test_the_last_word_of_each_peer_counts_in_any_order(reports, own):
    """Lost, doubled and late messages: what shows is own plus the latest heard."""
    made = cluster()
    for number in range(own):
        request = llmd.Request(id=f"r{number}", prompt=[1, 2])
        made.handle(e.RequestArrived(0.0, request))
    latest: dict[str, tuple[int, dict[str, Load]]] = {}
    for peer, sequence, loads in reports:
        made.handle(e.PeerReported(1.0, peer, sequence, loads, valid_s=9.0))
        if sequence > latest.get(peer, (0, {}))[0]:
            latest[peer] = sequence, loads
    mine = made.peers.own()
    assert sum(load.running_requests for load in mine.values()) == own
    for worker in ("w0", "w1"):
        want = mine.get(worker, Load())
        for _, loads in latest.values():
            want = [a + b for a, b in zip(want, loads.get(worker, Load()), strict=True)]
        assert seen(made, worker) == Load(*want)
    made.handle(e.Tick(20.0))
    assert seen(made) == mine.get("w0", Load())


class TestOverZmq:
    @pytest.fixture(autouse=True)
    def _zmq(self):
        pytest.importorskip("zmq")

    def exchange(self, made, **options):
        from llmd.adapters.peers import PeerExchange

        options = {"interval": 0.01, "valid_s": 0.5, **options}
        return PeerExchange(made, made.handle, time.monotonic, **options)

    async def until(self, true, seconds=10.0):
        async with asyncio.timeout(seconds):
            while not true():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def test_two_routers_see_each_other_and_recover_from_silence(self):
        one, other = cluster(), cluster()
        for made in (one, other):
            made.handle(e.Tick(time.monotonic()))
        request = llmd.Request(id="r", prompt=list(range(50)))
        (sent,) = one.handle(e.RequestArrived(time.monotonic(), request))
        worker = sent.decision.decode
        async with self.exchange(other) as theirs:
            async with self.exchange(one, peers=[theirs.endpoint]) as ours:
                theirs.listen(ours.endpoint)
                await self.until(lambda: seen(other, worker).running_requests == 1)
                assert seen(one, worker).running_requests == 1
                assert other.peers.own() == {}
            await asyncio.sleep(0.6)
            other.handle(e.Tick(time.monotonic()))
            assert seen(other, worker) == Load()

    async def test_garbage_is_counted_and_skipped(self):
        import zmq
        import zmq.asyncio

        made = cluster()
        with zmq.asyncio.Context() as context:
            socket = context.socket(zmq.PUB)
            port = socket.bind_to_random_port("tcp://127.0.0.1")
            async with self.exchange(made, peers=[f"tcp://127.0.0.1:{port}"]) as ours:
                bad = [b"", b"{", b"[]", b'{"v":2}', b'{"v":1,"loads":{"w":[1]}}']
                bad += [message(cell) for cell in ("Infinity", "NaN", 10**30, -1)]

                async def send():
                    while True:
                        for message in bad:
                            await socket.send(message)
                        await asyncio.sleep(0.01)

                sender = asyncio.create_task(send())
                await self.until(lambda: ours.counts["unreadable"] >= len(bad))
                sender.cancel()
                assert ours.counts["heard"] == 0
            socket.close(linger=0)


def message(cell):
    loads = f'{{"w":[{cell},0,0,0]}}'
    text = f'{{"v":1,"peer":"q","sequence":1,"valid_s":1.0,"loads":{loads}}}'
    return text.encode()


@given(garbage=st.binary(max_size=60) | st.text(max_size=30).map(str.encode))
def test_no_message_does_worse_than_a_value_error(garbage):
    pytest.importorskip("zmq")
    from llmd.adapters.peers import decode

    with pytest.raises(ValueError):  # noqa: PT011
        decode(garbage, 0.0)
