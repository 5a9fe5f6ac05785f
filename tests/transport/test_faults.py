"""What NIXL lacks, on real processes: death, hangs, damage, restarts."""

import signal
import subprocess
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest

pytest.importorskip("nixl")
pytest.importorskip("xxhash")

sys.path.insert(0, str(Path(__file__).parent))

import peer as p

from llmd.errors import TransferError
from llmd.native import loops
from llmd.transport import (
    BlocksFreed,
    Fetch,
    Offer,
    Side,
    TransferEnded,
    TransferId,
)


class Here:
    """The transport of this process and what it reported."""

    def __init__(self, mapped):
        slab = p.slab_of(np.zeros_like(p.fill(0)), mapped)
        self.slab = slab.owner
        self.transport = p.transport(slab)
        self.reports = []

    def ended(self, id):
        return self._find(TransferEnded, id)

    def freed(self, id):
        return self._find(BlocksFreed, id)

    def _find(self, kind, id):
        self.reports += self.transport.poll()
        found = [r for r in self.reports if r.id == id and type(r) is kind]
        assert len(found) <= 1
        return found[0] if found else None


@pytest.fixture(params=[True, False], ids=["mapped", "nixl"])
def mapped(request):
    """Whether peers copy into slabs themselves, or NIXL writes to them."""
    return request.param


@pytest.fixture
def here(mapped):
    here = Here(mapped)
    yield here
    here.transport.close()


@pytest.fixture
def peers(mapped):
    made = []

    def make(**kwargs):
        made.append(p.PeerProcess(mapped=mapped, **kwargs))
        return made[-1]

    yield make
    for peer in made:
        peer.kill()


def fetch(here, peer, blocks, *, early=False, timeout_s=20.0, ready=True):
    id = TransferId.fresh("r")
    peer.do("offer", Offer(id=id, blocks=blocks, ready=ready))
    name = here.transport.connect(peer.address)
    wanted = Fetch(id=id, peer=name, blocks=blocks, early=early, timeout_s=timeout_s)
    here.transport.fetch(wanted)
    return id


def test_blocks_cross_processes(here, peers, mapped):
    peer = peers()
    id = fetch(here, peer, [1, 2, 3, 60])
    p.wait_for(lambda: here.freed(id))
    assert here.ended(id).error is None
    assert (here.slab[:, [1, 2, 3, 60]] == peer.slab[:, [1, 2, 3, 60]]).all()
    p.wait_for(lambda: peer.do("path") is not None)
    path = peer.do("path")
    assert path.writes
    assert path.lanes.startswith("mapped" if mapped else "cma"), path
    assert not path.slow


def test_a_byte_flipped_on_the_way_is_sent_again(here, peers):
    peer = peers(damaged=2)
    id = fetch(here, peer, [5, 6, 7])
    p.wait_for(lambda: here.freed(id))
    ended = here.ended(id)
    assert ended.error is None
    assert ended.retransmitted_blocks == 2
    assert (here.slab[:, [5, 6, 7]] == peer.slab[:, [5, 6, 7]]).all()
    assert here.transport.counts["damaged_blocks"] == 2


def test_bytes_that_never_arrive_whole_are_an_error(here, peers):
    peer = peers(damaged=10_000)
    id = fetch(here, peer, [5, 6, 7])
    p.wait_for(lambda: here.freed(id))
    assert "damaged 3 times" in here.ended(id).error


@pytest.mark.skipif(loops is None, reason="no rings here")
@pytest.mark.parametrize("mapped", [True], indirect=True)
def test_peers_that_map_each_other_talk_through_memory(here, peers):
    peer = peers()
    for blocks in [5, 6, 7], [8, 9]:
        id = fetch(here, peer, blocks)
        p.wait_for(lambda id=id: here.freed(id))
        assert here.ended(id).error is None
    (reached,) = here.transport._carrier._reached.values()
    assert reached.mail.memory[:8].any(), "the peer has taken frames out"
    (inbox,) = here.transport._carrier._inbox._rings.values()
    assert inbox.memory[:8].any(), "and so has this one"


@pytest.mark.skipif(loops is None, reason="no rings here")
@pytest.mark.parametrize("mapped", [True], indirect=True)
def test_who_puts_nonsense_into_a_ring_is_heard_by_nixl_only(here, peers):
    peer = peers()
    id = fetch(here, peer, [5, 6, 7])
    p.wait_for(lambda: here.freed(id))
    (reached,) = here.transport._carrier._reached.values()
    ring = reached.mail.memory
    ring[64 + 4] ^= 1  # four billion bytes, it says
    p.wait_for(lambda: ring[128] == 0)
    p.wait_for(lambda: peer.do("counts").get("forged") == 1)
    id = fetch(here, peer, [8, 9])
    p.wait_for(lambda: here.freed(id))
    assert here.ended(id).error is None
    assert (here.slab[:, [8, 9]] == peer.slab[:, [8, 9]]).all()


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("mapped", [True, False])
def test_slabs_may_have_checksums_of_their_own(mapped, gathered):
    def own(slab):
        def sums(first, last, blocks):
            return slab.owner[first:last, blocks].sum(axis=2, dtype=np.uint64).ravel()

        known = sums if gathered else None
        return attrs.evolve(slab, sums=sums, gathered=known)

    slabs = [own(p.slab_of(p.fill(seed), mapped)) for seed in (1, 2)]
    with p.transport(slabs[0]) as source, p.transport(slabs[1]) as target:
        id = TransferId.fresh("r")
        source.offer(Offer(id=id, blocks=[3, 5]))
        peer = target.connect(source.address())
        target.fetch(Fetch(id=id, peer=peer, blocks=[8, 7]))
        reports = []
        p.wait_for(lambda: reports.extend(target.poll()) or len(reports) == 2)
        assert reports[0].error is None
        assert reports[0].retransmitted_blocks == 0
    assert (slabs[1].owner[:, [8, 7]] == slabs[0].owner[:, [3, 5]]).all()


@pytest.mark.parametrize("mapped", [True], indirect=True)
def test_a_block_that_is_not_here_is_written_nowhere(here, peers, monkeypatch):
    from llmd.transport.endpoint import Endpoint

    peer = peers()
    monkeypatch.setattr(Endpoint, "_check", lambda self, blocks: None)
    id = TransferId.fresh("r")
    peer.do("offer", Offer(id=id, blocks=[1]))
    name = here.transport.connect(peer.address)
    here.transport.fetch(Fetch(id=id, peer=name, blocks=[p.BLOCKS]))
    p.wait_for(lambda: here.freed(id))
    assert "not one of 64" in here.ended(id).error
    assert not here.slab.any()


def test_a_process_may_exit_with_a_transport_open():
    code = """
import sys; sys.path.insert(0, sys.argv[1])
import peer
mine = peer.transport(peer.slab_of(peer.fill(0), True))
"""
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", code, here], check=True, timeout=60)


def test_a_killed_source_frees_the_target(here, peers):
    peer = peers()
    id = fetch(here, peer, [1, 2], ready=False)
    peer.do("ready", id, 0)
    p.wait_for(lambda: (here.slab[0, [1, 2]] == peer.slab[0, [1, 2]]).all())
    peer.kill()
    p.wait_for(lambda: here.freed(id))
    assert here.ended(id).error
    assert here.transport.counts["quarantined_blocks"] == 0
    with pytest.raises(TransferError):
        here.transport.fetch(Fetch(id=id, peer="gone", blocks=[1]))


def test_a_source_killed_before_it_is_asked_is_an_error(here, peers):
    peer = peers()
    id = TransferId.fresh("r")
    peer.do("offer", Offer(id=id, blocks=[1]))
    peer.kill()
    try:
        name = here.transport.connect(peer.address)
        here.transport.fetch(Fetch(id=id, peer=name, blocks=[1], timeout_s=5.0))
    except TransferError:
        return  # found out at once
    p.wait_for(lambda: here.freed(id))
    assert here.ended(id).error


def test_a_restarted_source_is_a_new_peer(here, peers):
    first = peers()
    id = fetch(here, first, [1], ready=False)
    first.kill()
    p.wait_for(lambda: here.freed(id))
    second = peers(seed=2)
    id = fetch(here, second, [1])
    p.wait_for(lambda: here.freed(id))
    assert here.ended(id).error is None
    assert (here.slab[:, 1] == second.slab[:, 1]).all()


def test_a_hung_source_keeps_its_blocks_in_quarantine_until_it_wakes(here, peers):
    peer = peers()
    id = fetch(here, peer, [1, 2], ready=False)
    p.wait_for(lambda: peer.do("counts").get("offers"))
    peer.signal(signal.SIGSTOP)
    p.wait_for(lambda: here.ended(id))
    assert "hangs" in here.ended(id).error
    assert here.freed(id) is None
    with pytest.raises(TransferError, match="not over yet"):
        here.transport.fetch(
            Fetch(id=TransferId.fresh("s"), peer=here_peer(here), blocks=[2])
        )
    peer.signal(signal.SIGCONT)
    p.wait_for(lambda: here.freed(id))
    assert here.transport.counts["quarantined_blocks"] == 0


@pytest.mark.parametrize("fault", ["kill", "close"])
def test_a_peer_that_goes_while_nothing_is_open_is_let_go(here, peers, fault):
    peer = peers()
    id = fetch(here, peer, [1, 2])
    p.wait_for(lambda: here.freed(id))
    assert here.transport.counts["peers"] == 1
    if fault == "kill":
        peer.kill()
    else:
        peer.do("close")
    p.wait_for(lambda: not here.transport.counts["peers"])
    carrier = here.transport._carrier  # of another thread, which does that last
    p.wait_for(lambda: not carrier._known and not carrier._reached)


def here_peer(here):
    (name,) = here.transport._endpoint.peers
    return name


def test_a_hung_source_that_is_killed_frees_the_target(here, peers):
    peer = peers()
    id = fetch(here, peer, [1, 2], ready=False)
    p.wait_for(lambda: peer.do("counts").get("offers"))
    peer.signal(signal.SIGSTOP)
    p.wait_for(lambda: here.ended(id))
    peer.kill()
    p.wait_for(lambda: here.freed(id))


def offer(here, peer, ready):
    """Let *peer* be the target; return the id once it has asked."""
    id = TransferId.fresh("r")
    here.transport.offer(Offer(id=id, blocks=[3, 4], ready=ready))
    name = peer.do("connect", here.transport.address())
    peer.do("fetch", Fetch(id=id, peer=name, blocks=[3, 4], timeout_s=20.0))
    return id


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_target_that_is_lost_frees_the_source(here, peers, fault):
    peer = peers()
    id = offer(here, peer, ready=False)
    p.wait_for(lambda: here.transport._endpoint.peers)
    here.transport.ready(id, 0)
    peer.signal(fault)
    p.wait_for(lambda: here.freed(id))
    ended = here.ended(id)
    assert ended.side is Side.SOURCE
    assert ended.error
    assert here.transport.counts["offers"] == 0


def test_an_offer_that_lapsed_is_refused_though_its_blocks_hold_other_bytes(
    here, peers
):
    peer = peers()
    id = TransferId.fresh("r")
    peer.do("offer", Offer(id=id, blocks=[1, 2], timeout_s=0.05))
    p.wait_for(lambda: any(type(r) is BlocksFreed for r in peer.do("poll")))
    peer.do("scribble", [1, 2])  # another request has the blocks now
    name = here.transport.connect(peer.address)
    here.transport.fetch(Fetch(id=id, peer=name, blocks=[1, 2]))
    p.wait_for(lambda: here.freed(id))
    assert "lapsed" in here.ended(id).error
    assert not here.slab.any()


def test_a_frame_without_the_key_is_dropped(here, peers):
    peer = peers()
    id = fetch(here, peer, [1], ready=False)
    name = here_peer(here)
    forged = b"\x07\x01" + bytes(60)  # FAIL, but sealed by nobody
    here.transport._calls.put(lambda: here.transport._endpoint.heard(name, forged, 0.0))
    p.wait_for(lambda: here.transport.counts.get("forged"))
    assert here.ended(id) is None
    peer.do("ready", id, 0)
