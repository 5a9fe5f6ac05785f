"""One contract for every transport; it runs on each of them."""

import hmac
import itertools
import math
import time

import attrs
import numpy as np
import pytest

from llmd.errors import CircuitOpen, HandshakeRefused, TransferError
from llmd.transport import (
    Address,
    BlocksFreed,
    Fetch,
    Layout,
    LocalLink,
    LocalTransport,
    Offer,
    Settings,
    Side,
    TransferEnded,
    TransferId,
)

LAYOUT = Layout(
    model="m", dtype="f32", layers=3, block_tokens=16, block_bytes=4096, order="nhd"
)
# Nobody is silent for longer who only waits for a core.
QUICK = Settings(piece_bytes=4 * 4096, heartbeat_s=0.05, silence_s=1.5)


class Local:
    """Two transports over a modelled link, in virtual time."""

    def __init__(self):
        self.now = 0.0
        self.link = LocalLink(lambda: self.now, bytes_per_s=1e8, latency_s=1e-4)

    def make(self, slab, layout=LAYOUT, key=None):
        link = self.link
        if key is not None:
            link = attrs.evolve(self.link, key=key)
        return LocalTransport(link, layout, slab, settings=QUICK)

    def zeros(self, blocks):
        return np.zeros((LAYOUT.layers, blocks, LAYOUT.block_bytes), np.uint8)

    def wait(self):
        self.now += 1e-3

    def clock(self):
        return self.now


class Nixl:
    """Two agents of one process over shared memory, in real time."""

    zeros = Local.zeros

    def make(self, slab, layout=LAYOUT, key=b"k" * 32):
        from llmd.adapters.nixl import NixlTransport, Slab

        made = Slab.of(slab, layout, shared=self.memory(slab))
        return NixlTransport(made, key or b"k" * 32, settings=QUICK)

    def memory(self, slab):
        return None

    def wait(self):
        time.sleep(1e-3)

    def clock(self):
        return time.monotonic()


class Mapped(Nixl):
    """The same with slabs that the other agent maps and copies into."""

    def __init__(self):
        self.memories = []

    def zeros(self, blocks):
        from llmd.adapters.nixl import SharedMemory

        shape = LAYOUT.layers, blocks, LAYOUT.block_bytes
        self.memories.append(SharedMemory(math.prod(shape)))
        return self.memories[-1].array.reshape(shape)

    def memory(self, slab):
        shared = [m for m in self.memories if np.may_share_memory(m.array, slab)]
        return shared[0] if shared else None


@pytest.fixture(params=[Local, Nixl, Mapped])
def world(request):
    if request.param is not Local:
        pytest.importorskip("nixl")
        pytest.importorskip("xxhash")
    return request.param()


class Pair:
    """A source and a target, and all that they reported."""

    def __init__(self, world, **kwargs):
        rng = np.random.default_rng(0)
        self.world = world
        self.theirs, self.ours = world.zeros(64), world.zeros(48)
        self.theirs[:] = rng.integers(0, 256, self.theirs.shape, dtype=np.uint8)
        self.source = world.make(self.theirs, **kwargs)
        self.target = world.make(self.ours, **kwargs)
        self.reports = {Side.SOURCE: [], Side.TARGET: []}
        self.peer = self.target.connect(self.source.address())

    def poll(self):
        for end in (self.source, self.target):
            for report in end.poll():
                self.reports[report.side].append(report)

    def until(self, condition, steps=8000):
        for _ in range(steps):
            self.poll()
            if condition():
                return
            self.world.wait()
        pytest.fail(f"never happened; reports so far: {self.reports}")

    def until_asked(self):
        """Wait until the source knows who wants what it offers."""
        offers = self.source._endpoint.sources.offers
        self.until(lambda: any(out.peer for out in list(offers.values())))

    def ended(self, id, side=Side.TARGET):
        for report in self.reports[side]:
            if isinstance(report, TransferEnded) and report.id == id:
                return report
        return None

    def free(self, id, side=Side.TARGET):
        return BlocksFreed in [type(r) for r in self.reports[side] if r.id == id]

    def same(self, source, target):
        return (self.theirs[:, source] == self.ours[:, target]).all()

    def close(self):
        self.source.close()
        self.target.close()


@pytest.fixture
def pair(world):
    pair = Pair(world)
    yield pair
    pair.close()


def test_blocks_arrive_where_they_were_wanted(pair):
    id = TransferId.fresh("r")
    source, target = [3, 4, 5, 20, 9, 1], [40, 41, 42, 2, 7, 0]
    pair.source.offer(Offer(id=id, blocks=source))
    pair.target.fetch(Fetch(id=id, peer=pair.peer, blocks=target))
    pair.until(lambda: pair.free(id) and pair.free(id, Side.SOURCE))
    assert pair.ended(id).error is None
    assert pair.ended(id, Side.SOURCE).error is None
    assert pair.same(source, target)
    rest = np.setdiff1d(np.arange(48), target)
    assert not pair.ours[:, rest].any(), "a block nobody named was written"


def test_each_transfer_ends_once_and_then_frees_once(pair):
    ids = [TransferId.fresh(f"r{i}") for i in range(8)]
    for i, id in enumerate(ids):
        pair.source.offer(Offer(id=id, blocks=range(i, i + 5)))
        pair.target.fetch(Fetch(id=id, peer=pair.peer, blocks=range(5 * i, 5 * i + 5)))
    pair.until(lambda: all(pair.free(id, side) for id in ids for side in Side))
    for side, id in itertools.product(Side, ids):
        kinds = [type(r) for r in pair.reports[side] if r.id == id]
        assert kinds == [TransferEnded, BlocksFreed]
    held = ("offers", "fetches", "writes", "quarantined_blocks")
    ends = (pair.source, pair.target)
    pair.until(lambda: not any(end.counts[name] for end in ends for name in held))


def test_leading_blocks_can_be_skipped(pair):
    id = TransferId.fresh("r")
    pair.source.offer(Offer(id=id, blocks=[10, 11, 12, 13]))
    pair.target.fetch(Fetch(id=id, peer=pair.peer, blocks=[5, 6], first=2))
    pair.until(lambda: pair.free(id))
    assert pair.ended(id).error is None
    assert pair.same([12, 13], [5, 6])


def test_layers_go_as_they_are_ready_and_not_before(pair):
    id = TransferId.fresh("r")
    pair.target.fetch(Fetch(id=id, peer=pair.peer, blocks=[1, 2], early=True))
    pair.source.offer(Offer(id=id, blocks=[8, 9], ready=False))
    pair.source.ready(id, 1)
    pair.until(lambda: (pair.ours[1, [1, 2]] == pair.theirs[1, [8, 9]]).all())
    assert not pair.ours[0].any()
    assert pair.ended(id) is None
    pair.source.ready(id, 0)
    pair.source.ready(id, 2)
    pair.until(lambda: pair.free(id))
    assert pair.ended(id).error is None
    assert pair.same([8, 9], [1, 2])


def test_who_asks_early_waits_as_long_as_it_said(pair):
    """Nothing else is open: a source that was asked must say that it is alive."""
    id = TransferId.fresh("r")
    pair.target.fetch(Fetch(id=id, peer=pair.peer, blocks=[1], early=True))
    began = pair.world.clock()
    pair.until(lambda: pair.world.clock() > began + 3 * QUICK.silence_s)
    assert pair.ended(id) is None
    pair.source.offer(Offer(id=id, blocks=[8]))
    pair.until(lambda: pair.free(id))
    assert pair.ended(id).error is None
    assert pair.same([8], [1])


@pytest.mark.parametrize("blocks", [[], [5]])
def test_an_offer_that_comes_when_nobody_wants_it_any_more_ends(pair, blocks):
    id = TransferId.fresh("r")
    pair.target.fetch(Fetch(id=id, peer=pair.peer, blocks=blocks, early=True))
    pair.target.cancel(id, "the client went away")
    pair.until(lambda: pair.free(id))
    pair.source.offer(Offer(id=id, blocks=[1], ready=False))
    pair.until(lambda: pair.free(id, Side.SOURCE))
    # Nothing to send was what there was to send.
    assert bool(pair.ended(id, Side.SOURCE).error) == bool(blocks)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("ready", [False, True])
def test_a_fetch_of_nothing_lets_the_offer_go_as_one_that_went_well(pair, early, ready):
    id = TransferId.fresh("r")
    offer = Offer(id=id, blocks=[1], ready=ready)
    if not early:
        pair.source.offer(offer)
    pair.target.fetch(Fetch(id=id, peer=pair.peer, blocks=[], early=early, first=1))
    pair.until(lambda: pair.free(id))
    for _ in range(50 * early):  # the request gets there
        pair.poll()
        pair.world.wait()
    if early:
        pair.source.offer(offer)
    pair.until(lambda: pair.free(id, Side.SOURCE))
    pair.source.ready(id, 0)  # too late, and harmless
    assert pair.ended(id).error is None
    assert pair.ended(id, Side.SOURCE).error is None
    assert not pair.source.counts.get("failed")
    assert not pair.ours.any()


ODD_IDS = ["r", ("r", 1, 2), (b"r", 1), ("r", 1.5), ("r", -1), ("r", 1 << 64), None]
ODD = [
    *[{"id": id} for id in ODD_IDS],
    {"blocks": ["x"]},
    {"blocks": 3},
    {"timeout_s": math.inf},
    {"timeout_s": math.nan},
    {"timeout_s": -1.0},
    {"timeout_s": "5"},
]
ODD_FETCHES = [{"first": -1}, {"first": 1 << 40}, {"first": "x"}, {"peer": None}]


@pytest.mark.parametrize("odd", [*ODD, *ODD_FETCHES], ids=str)
def test_bad_input_is_refused_before_anything_is_booked(pair, odd):
    made = {"id": TransferId.fresh("r"), "blocks": [1], **odd}
    with pytest.raises(TransferError):
        pair.target.fetch(Fetch(**{"peer": pair.peer, **made}))
    if odd not in ODD_FETCHES:
        with pytest.raises(TransferError):
            pair.source.offer(Offer(**made))
    if "id" in odd:
        with pytest.raises(TransferError):
            pair.source.ready(odd["id"], 0)
        with pytest.raises(TransferError):
            pair.source.cancel(odd["id"])
    for layer in "x", 0.5, -1:
        with pytest.raises(TransferError):
            pair.source.ready(TransferId.fresh("r"), layer)
    for end in pair.source, pair.target:
        assert not end.counts["offers"] + end.counts["fetches"]
        assert not end.counts["quarantined_blocks"]


def test_numbers_of_numpy_are_numbers(pair):
    id = TransferId("r", np.int64(7))
    offer = Offer(id=id, blocks=np.arange(3), ready=False, timeout_s=np.float64(9))
    pair.source.offer(offer)
    wanted = {"blocks": np.array([4, 5]), "first": np.int64(1), "early": np.True_}
    pair.target.fetch(Fetch(id=id, peer=pair.peer, **wanted))
    for layer in np.arange(LAYOUT.layers):
        pair.source.ready(id, layer)
    pair.until(lambda: pair.free(id) and pair.free(id, Side.SOURCE))
    assert pair.ended(id).error is None
    assert (pair.ours[:, [4, 5]] == pair.theirs[:, [1, 2]]).all()


def test_a_reason_may_be_any_text(pair):
    for number, reason in enumerate(["\udc80", "\xe9" * 100_000, None, ""]):
        id = TransferId("r", number)
        pair.target.fetch(Fetch(id=id, peer=pair.peer, blocks=[1], early=True))
        pair.target.cancel(id, reason)
        pair.until(lambda id=id: pair.free(id))
        assert pair.ended(id).error is not None


def test_a_closed_transport_takes_nothing(pair):
    pair.source.close()
    id = TransferId.fresh("r")
    for call in (
        lambda: pair.source.offer(Offer(id=id, blocks=[1])),
        lambda: pair.source.fetch(Fetch(id=id, peer=pair.target.id, blocks=[1])),
        lambda: pair.source.ready(id, 0),
        lambda: pair.source.cancel(id),
        lambda: pair.source.connect(pair.target.address()),
    ):
        with pytest.raises(TransferError, match="closed"):
            call()
    assert not pair.source.counts["offers"]


@pytest.mark.parametrize("side", list(Side))
def test_blocks_are_not_free_while_a_write_is_on_its_way(side):
    """Whoever gives up: bytes may land, and be read, until the write has ended."""
    now = 0.0
    link = LocalLink(clock=lambda: now, bytes_per_s=1e3)
    layout = attrs.evolve(LAYOUT, layers=1, block_bytes=8)
    source = LocalTransport(link, layout, np.ones((1, 400, 8), np.uint8))
    target = LocalTransport(link, layout, np.zeros((1, 400, 8), np.uint8))
    id, blocks = TransferId.fresh("r"), range(300)
    peer = target.connect(source.address())
    source.offer(Offer(id=id, blocks=blocks))
    target.fetch(Fetch(id=id, peer=peer, blocks=blocks))
    now = 0.1
    ends = source, target
    assert [end.poll() for end in ends] == [[], []]
    assert source.counts["writes"] == 1  # which ends at 2.4
    (source if side is Side.SOURCE else target).cancel(id)
    reports = []
    while now < 2.3:
        now += 0.1
        reports += [report for end in ends for report in end.poll()]
    assert not any(isinstance(report, BlocksFreed) for report in reports)
    assert any(isinstance(report, TransferEnded) for report in reports)
    now = 5.0
    reports = [report for end in ends for report in end.poll()]
    freed = [report.side for report in reports if isinstance(report, BlocksFreed)]
    assert sorted(freed, key=str) == sorted(Side, key=str)


def test_a_lapsed_offer_is_refused_and_never_read(pair):
    id = TransferId.fresh("r")
    pair.source.offer(Offer(id=id, blocks=[1, 2], timeout_s=0.02))
    pair.until(lambda: pair.free(id, Side.SOURCE))
    assert "nobody fetched" in pair.ended(id, Side.SOURCE).error
    pair.theirs[:, [1, 2]] = 99  # reused for another request
    pair.target.fetch(Fetch(id=id, peer=pair.peer, blocks=[1, 2]))
    pair.until(lambda: pair.free(id))
    assert "lapsed" in pair.ended(id).error
    assert not pair.ours.any()


def test_another_generation_is_another_transfer(pair):
    id = TransferId.fresh("r")
    other = id._replace(generation=id.generation ^ 1)
    pair.source.offer(Offer(id=id, blocks=[1]))
    pair.target.fetch(Fetch(id=other, peer=pair.peer, blocks=[1]))
    pair.until(lambda: pair.free(other))
    assert "not offered" in pair.ended(other).error
    assert pair.ended(id, Side.SOURCE) is None
    assert not pair.ours.any()


def test_an_offer_is_fetched_once(pair):
    id = TransferId.fresh("r")
    third = pair.world.make(np.zeros_like(pair.ours))
    try:
        pair.source.offer(Offer(id=id, blocks=[1], ready=False))
        pair.target.fetch(Fetch(id=id, peer=pair.peer, blocks=[1]))
        # Its HELLO and ASK must be there before the other's.
        pair.until_asked()
        peer = third.connect(pair.source.address())
        third.fetch(Fetch(id=id, peer=peer, blocks=[1]))
        got = []
        pair.until(lambda: got.extend(third.poll()) or len(got) == 2)
        assert "another peer" in got[0].error
    finally:
        third.close()


def test_a_fetch_that_takes_too_long_frees_its_blocks_when_the_source_lets_go(pair):
    id = TransferId.fresh("r")
    pair.source.offer(Offer(id=id, blocks=[1, 2], ready=False))
    pair.target.fetch(Fetch(id=id, peer=pair.peer, blocks=[1, 2], timeout_s=0.1))
    pair.until(lambda: pair.free(id) and pair.free(id, Side.SOURCE))
    assert "deadline" in pair.ended(id).error
    assert pair.ended(id, Side.SOURCE).error is not None
    pair.source.ready(id, 0)  # too late, and harmless
    for _ in range(20):
        pair.poll()
        pair.world.wait()
    assert not pair.ours.any()


@pytest.mark.parametrize("side", list(Side))
def test_either_end_can_cancel(pair, side):
    id = TransferId.fresh("r")
    pair.source.offer(Offer(id=id, blocks=[1, 2], ready=False))
    pair.target.fetch(Fetch(id=id, peer=pair.peer, blocks=[1, 2]))
    pair.until_asked()
    end = pair.source if side is Side.SOURCE else pair.target
    end.cancel(id, "the client went away")
    pair.until(lambda: pair.free(id) and pair.free(id, Side.SOURCE))
    assert pair.ended(id, side).error == "the client went away"
    assert pair.ended(id).error is not None


def test_blocks_in_quarantine_cannot_be_fetched_into(pair):
    id, other = TransferId.fresh("r"), TransferId.fresh("s")
    pair.source.offer(Offer(id=id, blocks=[1, 2], ready=False))
    pair.target.fetch(Fetch(id=id, peer=pair.peer, blocks=[7, 8]))
    with pytest.raises(TransferError, match="not over yet"):
        pair.target.fetch(Fetch(id=other, peer=pair.peer, blocks=[8, 9]))


def test_what_cannot_be_is_refused_at_once(pair):
    id = TransferId.fresh("r")
    with pytest.raises(TransferError, match="of a slab of 64"):
        pair.source.offer(Offer(id=id, blocks=[64]))
    with pytest.raises(TransferError, match="twice"):
        pair.target.fetch(Fetch(id=id, peer=pair.peer, blocks=[3, 3]))
    with pytest.raises(TransferError, match="not connected"):
        pair.target.fetch(Fetch(id=id, peer="stranger", blocks=[3]))
    pair.source.offer(Offer(id=id, blocks=[1]))
    with pytest.raises(TransferError, match="already"):
        pair.source.offer(Offer(id=id, blocks=[2]))


@pytest.mark.parametrize("timeout_s", [1.0, 60.0])
def test_more_blocks_than_offered_are_refused(pair, timeout_s):
    id = TransferId.fresh("r")
    pair.source.offer(Offer(id=id, blocks=[1, 2], timeout_s=3.0))
    wrong = Fetch(id=id, peer=pair.peer, blocks=[1, 2, 3], timeout_s=timeout_s)
    began = pair.world.clock()
    pair.target.fetch(wrong)
    pair.until(lambda: pair.free(id))
    assert "3 blocks" in pair.ended(id).error
    # The offer lapses when it would have, whatever the wrong fetch said.
    pair.until(lambda: pair.free(id, Side.SOURCE))
    assert 2.9 < pair.world.clock() - began < 30.0


@pytest.mark.parametrize(
    ("field", "value"),
    [("model", "other"), ("dtype", "bf16"), ("block_tokens", 32), ("order", "hnd")],
)
def test_a_peer_of_another_layout_is_refused_by_field(pair, field, value):
    layout = attrs.evolve(LAYOUT, **{field: value})
    other = pair.world.make(np.zeros_like(pair.ours), layout=layout)
    try:
        with pytest.raises(HandshakeRefused) as refused:
            pair.target.connect(other.address())
        assert refused.value.field == field
        assert repr(value) in str(refused.value)
    finally:
        other.close()


def test_a_peer_of_another_key_is_refused(pair):
    other = pair.world.make(np.zeros_like(pair.ours), key=b"x" * 32)
    try:
        with pytest.raises(HandshakeRefused) as refused:
            pair.target.connect(other.address())
        assert refused.value.field == "key"
    finally:
        other.close()


def test_closing_the_source_ends_what_the_target_waits_for(pair):
    id = TransferId.fresh("r")
    pair.source.offer(Offer(id=id, blocks=[1], ready=False))
    pair.target.fetch(Fetch(id=id, peer=pair.peer, blocks=[1]))
    pair.until_asked()
    pair.source.close()
    pair.until(lambda: pair.free(id))
    assert pair.ended(id).error is not None
    pair.until(lambda: not pair.target.counts["quarantined_blocks"])


def test_a_peer_that_fails_again_and_again_is_not_asked_any_more(pair):
    for i in range(3):
        id = TransferId.fresh(f"r{i}")
        pair.source.offer(Offer(id=id, blocks=[1], ready=False))
        pair.target.fetch(Fetch(id=id, peer=pair.peer, blocks=[1], timeout_s=0.02))
        pair.until(lambda id=id: pair.free(id))
    with pytest.raises(CircuitOpen):
        pair.target.fetch(Fetch(id=TransferId.fresh("r"), peer=pair.peer, blocks=[1]))


@pytest.mark.parametrize(
    "odd",
    [
        {"writes_in_flight": 0},
        {"piece_bytes": -5},
        {"piece_bytes": 1.5},
        {"copiers": 65},
        {"max_attempts": 201},
        {"heartbeat_s": 0.0},
        {"silence_s": math.nan},
        {"heartbeat_s": 9.0, "silence_s": 1.0},
        {"early_asks": -1},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(odd):
    with pytest.raises(TransferError, match=next(iter(odd))):
        Settings(**odd)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"protocol": 4}', b'{"protocol": 4, "layout": 1}']
)
def test_a_signed_address_that_is_none_is_refused(body):
    key = b"k" * 32
    signed = hmac.digest(key, body, "sha256") + body
    with pytest.raises(HandshakeRefused):
        Address.verify(signed, key, LAYOUT)


def test_another_protocol_is_named():
    key, body = b"k" * 32, b'{"protocol": 0}'
    signed = hmac.digest(key, body, "sha256") + body
    with pytest.raises(HandshakeRefused) as refused:
        Address.verify(signed, key, LAYOUT)
    assert refused.value.field == "protocol"


@pytest.mark.parametrize(
    "odd",
    [
        {"layers": 1.5},
        {"layers": "2"},
        {"layers": None},
        {"layers": 0},
        {"layers": 1 << 17},
        {"block_tokens": math.nan},
        {"block_tokens": True},
        {"block_bytes": 1 << 70},
        {"model": None},
        {"dtype": b"u8"},
        {"order": 5},
    ],
    ids=str,
)
def test_layouts_that_cannot_be_are_refused(odd):
    with pytest.raises(TransferError):
        attrs.evolve(LAYOUT, **odd)
