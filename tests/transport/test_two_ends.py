"""Two NIXL transports of one process: what one does must not harm what is open."""

import collections
import os
import sys
import time
from pathlib import Path

import attrs
import numpy as np
import pytest

pytest.importorskip("nixl")
pytest.importorskip("xxhash")
if not hasattr(os, "memfd_create"):
    pytest.skip("no memory to share here", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

import peer as p

from llmd.adapters.nixl import NixlTransport, Slab
from llmd.errors import TransferError
from llmd.native import loops
from llmd.transport import Fetch, Layout, Offer, TransferEnded, TransferId
from llmd.transport.frames import Frame, Kind

LAYOUT = Layout(model="m", dtype="u8", layers=1, block_tokens=1, block_bytes=4096)
BLOCKS = 1024
rings = pytest.mark.skipif(loops is None, reason="no rings here")


class End:
    """A transport, its slab, and what it reported."""

    def __init__(self, seed, wake=None, gathered=None):
        slab = Slab.allocate(LAYOUT, BLOCKS)
        slab.owner[:] = seed
        self.slab = attrs.evolve(slab, gathered=gathered)
        self.transport = NixlTransport(self.slab, p.KEY, wake=wake)
        self.reports = []

    def outcomes(self):
        self.reports += self.transport.poll()
        return {
            r.id.request: r.error for r in self.reports if isinstance(r, TransferEnded)
        }

    def freed(self):
        self.reports += self.transport.poll()
        return [r.id.request for r in self.reports if not isinstance(r, TransferEnded)]

    def meet(self, other):
        self.transport.connect(other.transport.address())
        for one, of in (self, other), (other, self):
            p.wait_for(lambda one=one, of=of: of.transport.id in one.met())

    def met(self):
        return self.transport._carrier._reached if loops is None else self.rings()

    def rings(self):
        return self.transport._carrier._inbox._rings


@pytest.fixture
def ends():
    made = []

    def make(*args, **kwargs):
        made.append(End(*args, **kwargs))
        return made[-1]

    yield make
    for end in made:
        end.transport.close()


def begin(source, target, name, block, *, ready=False, timeout_s=10.0):
    id = TransferId.fresh(name)
    source.transport.offer(Offer(id=id, blocks=[block], ready=ready))
    wanted = Fetch(id=id, peer=source.transport.id, blocks=[block], timeout_s=timeout_s)
    target.transport.fetch(wanted)
    return id


@pytest.mark.parametrize(
    "id",
    [TransferId("x" * 70_000, 1), TransferId("\ud800", 1), TransferId("r", 1 << 64)],
)
def test_what_cannot_be_named_is_refused_and_nothing_else_ends(ends, id):
    source, target = ends(7), ends(0)
    target.meet(source)
    open_one = begin(source, target, "open", 1)
    for call in (
        lambda: target.transport.fetch(
            Fetch(id=id, peer=source.transport.id, blocks=[2])
        ),
        lambda: source.transport.offer(Offer(id=id, blocks=[2])),
        lambda: source.transport.ready(id, 0),
        lambda: target.transport.cancel(id),
    ):
        with pytest.raises(TransferError):
            call()
    source.transport.ready(open_one, 0)
    p.wait_for(target.freed)
    assert target.outcomes() == {"open": None}
    assert (target.slab.owner[0, 1] == 7).all()


def test_checksums_that_raise_end_what_they_are_of_and_nothing_else(ends):
    """The peer is alive: what it has yet to write is not free."""
    calls = []

    def gathered(first, last, blocks):
        calls.append(blocks)
        raise RuntimeError("an error of CUDA, say")

    one, other = ends(7), ends(9, gathered=gathered)
    other.meet(one)
    coming = begin(one, other, "coming", 1)
    begin(other, one, "going", 3, ready=True)
    p.wait_for(one.outcomes)
    assert calls
    assert "an error of CUDA" in other.outcomes()["going"]
    assert one.outcomes()["going"] is not None
    assert "coming" not in other.outcomes()
    one.transport.ready(coming, 0)
    p.wait_for(lambda: "coming" in other.freed())
    assert other.outcomes()["coming"] is None
    assert (other.slab.owner[0, 1] == 7).all()


def test_a_wake_that_raises_costs_no_transfer(ends):
    raised = []

    def wake():
        if not raised:
            raised.append(True)
            raise ValueError("the user's own")

    source, target = ends(7), ends(0, wake=wake)
    target.meet(source)
    ids = [begin(source, target, str(i), i) for i in range(5)]
    for id in ids:
        source.transport.ready(id, 0)
    p.wait_for(lambda: len(target.outcomes()) == 5)
    assert raised
    assert set(target.outcomes().values()) == {None}


def test_a_nack_of_what_is_not_there_is_dropped(ends):
    source, target = ends(7), ends(0)
    target.meet(source)
    id = begin(source, target, "r", 1)
    values = np.array([77], np.uint64).tobytes()
    nack = Frame(Kind.NACK, id, values=values, blocks=1)
    outbox = target.transport._endpoint.outbox
    target.transport._calls.put(lambda: outbox.send(source.transport.id, nack))
    source.transport.ready(id, 0)
    p.wait_for(target.freed)
    assert target.outcomes() == {"r": None}
    p.wait_for(source.freed)
    assert source.outcomes() == {"r": None}


@pytest.mark.parametrize("count", [250])
def test_who_says_goodbye_is_heard_out_first(ends, count, monkeypatch):
    """However many acknowledgements wait where they are looked at late."""
    source, target = ends(7), ends(0)
    target.meet(source)
    ids = [begin(source, target, str(i), i) for i in range(count)]
    endpoint, carrier = source.transport._endpoint, source.transport._carrier

    def write_all_and_stall():
        for id in ids:
            endpoint.ready(id, 0)
        while endpoint.outbox.effects or endpoint.pump():
            carrier.carry()
            for token in list(carrier._flying):
                carrier._check(token, time.monotonic())
        until = time.monotonic() + 0.6
        while time.monotonic() < until:  # UCX needs its turns to let a goodbye in
            for sender, messages in hear().items():
                kept.setdefault(sender, []).extend(messages)
            time.sleep(1e-3)

    def kept_first():
        notified = dict(kept) or hear()
        kept.clear()
        return notified

    kept, hear = {}, carrier._agent.get_new_notifs
    monkeypatch.setattr(carrier._agent, "get_new_notifs", kept_first)
    source.transport._calls.put(write_all_and_stall)
    p.wait_for(lambda: len(target.outcomes()) == count)
    target.transport.close()
    p.wait_for(lambda: len(source.freed()) == count)
    found = collections.Counter(source.outcomes().values())
    assert found == {None: count}


@rings
def test_who_lost_a_peer_and_meets_it_again_reads_its_ring_again(ends):
    one, other = ends(7), ends(9)
    other.meet(one)

    def lose():
        other.transport._carrier._lose(one.transport.id, OSError(), time.monotonic())

    other.transport._calls.put(lose)
    p.wait_for(lambda: not other.rings())
    other.meet(one)
    begin(one, other, "again", 5, ready=True)
    p.wait_for(other.freed)
    assert other.outcomes() == {"again": None}


@rings
def test_a_frame_that_is_none_is_counted_and_the_next_is_heard(ends):
    source, target = ends(7), ends(0)
    target.meet(source)
    mail = target.transport._carrier._reached[source.transport.id].mail

    def scribble():
        assert mail.put(b"no frame")
        assert mail.put(bytes(100))

    target.transport._calls.put(scribble)
    begin(source, target, "r", 1, ready=True)
    p.wait_for(target.freed)
    assert target.outcomes() == {"r": None}
    assert source.transport.counts["forged"] == 2
    assert source.rings()


def test_an_ask_without_a_time_is_refused_and_harms_nobody(ends):
    source, target = ends(7), ends(0)
    target.meet(source)
    open_one = begin(source, target, "open", 1)
    id = TransferId.fresh("odd")
    source.transport.offer(Offer(id=id, blocks=[2]))
    send = target.transport._endpoint.outbox.send
    for text in b"soon", b"9" * 5000, b"-1", b"":
        ask = Frame(Kind.ASK, id, values=bytes(8), text=text)
        target.transport._calls.put(lambda ask=ask: send(source.transport.id, ask))
    p.wait_for(lambda: source.transport.counts.get("forged") == 4)
    source.transport.ready(open_one, 0)
    p.wait_for(target.freed)
    assert target.outcomes() == {"open": None}


def test_a_wake_that_waits_for_its_transport_is_told_so_at_once(ends):
    told = []

    def wake():
        for call in (
            lambda: target.transport.offer(Offer(id=("more", 1), blocks=[5])),
            target.transport.close,
        ):
            try:
                call()
            except TransferError as error:
                told.append(str(error))

    source, target = ends(7), ends(0, wake=wake)
    target.meet(source)
    begin(source, target, "r", 1, ready=True)
    p.wait_for(target.freed)
    assert target.outcomes() == {"r": None}
    assert len(told) >= 2
    assert {"a wake cannot wait for the transport that calls it"} == set(told)


def test_a_transport_that_fails_ends_all_that_is_open_and_takes_no_more(ends):
    """No such failure is known: one is put in."""
    source, target = ends(7), ends(0)
    target.meet(source)
    for name in "ab":
        begin(source, target, name, ord(name))

    def broken(now):
        raise RuntimeError("a fault of ours")

    target.transport._tick = broken
    p.wait_for(lambda: len(target.outcomes()) == 2)
    for error in target.outcomes().values():
        assert "a fault of ours" in error
    for call in (
        lambda: begin(source, target, "c", 9),
        lambda: target.transport.ready(TransferId("a", 1), 0),
        lambda: target.transport.cancel(TransferId("a", 1)),
    ):
        with pytest.raises(TransferError, match="a fault of ours"):
            call()
    # The other end has heard of it, and has its blocks back.
    p.wait_for(lambda: {"a", "b"} <= set(source.freed()))
    target.transport.close()


@pytest.mark.parametrize(
    "odd",
    [{"slab": None}, {"key": None}, {"key": b"short"}, {"settings": {}}, {"wake": 5}],
    ids=str,
)
def test_what_no_transport_can_be_made_of_is_refused(odd):
    made = {"slab": Slab.allocate(LAYOUT, 4), "key": b"k" * 32, **odd}
    with pytest.raises(TransferError):
        NixlTransport(made.pop("slab"), made.pop("key"), **made)


@pytest.mark.parametrize("odd", [(None, 4), (LAYOUT, 1.5), (LAYOUT, 0), (LAYOUT, "4")])
def test_slabs_that_cannot_be_are_refused(odd):
    with pytest.raises(TransferError):
        Slab.allocate(*odd)
