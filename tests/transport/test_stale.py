"""Frames that say again, late or wrongly what was said before."""

import numpy as np
import pytest

from llmd.errors import TransferError
from llmd.transport import (
    Endpoint,
    Fetch,
    Frame,
    Kind,
    Layout,
    Offer,
    Settings,
    TransferId,
)
from llmd.transport.local import held, multilinear
from llmd.transport.outbox import Send, Write

KEY = b"k" * 32
LAYOUT = Layout(model="m", dtype="u8", layers=2, block_tokens=1, block_bytes=8)
ID = TransferId("r", 1)


@pytest.fixture
def target():
    """A target that waits for blocks 2 and 3 of both layers from "s"."""
    slab = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8)

    def sums(first, last, blocks):
        return multilinear(slab[first:last, blocks].reshape(-1, 8))

    end = Endpoint("t", KEY, LAYOUT, 8, sums)
    end.meet("s", 0.0)
    end.fetch(Fetch(id=ID, peer="s", blocks=[2, 3]), 0.0)
    end.outbox.effects.clear()
    return end


def data(target, of_layer, **changes):
    sums = target.sums(of_layer, of_layer + 1, np.array([2, 3]))
    frame = Frame(Kind.DATA, ID, of_layer, values=sums.tobytes(), blocks=2)
    return frame._replace(**changes).seal(KEY, "s", "t")


def hear(target, frame, sender="s"):
    target.heard(sender, frame, 0.0)
    return [type(report).__name__ for report in target.outbox.reports]


def test_what_is_said_twice_counts_once(target):
    for _ in range(3):
        assert hear(target, data(target, 0)) == []
    assert target.outbox.counts["stale"] == 2
    assert hear(target, data(target, 1)) == ["TransferEnded", "BlocksFreed"]


@pytest.mark.parametrize(
    "change",
    [
        {"id": ID._replace(generation=2)},
        {"id": ID._replace(request="other")},
        {"attempt": 1},
        {"layer": 7},
        {"layers": 2},
        {"start": 1},
        {"blocks": 9},
        {"blocks": 0},
    ],
)
def test_what_does_not_fit_is_dropped(target, change):
    assert hear(target, data(target, 0, **change)) == []
    assert target.outbox.counts["stale"] == 1
    assert held(target)["fetches"] == 1


def test_what_another_peer_says_of_it_is_dropped(target):
    target.meet("x", 0.0)
    sums = target.sums(0, 1, np.array([2, 3]))
    frame = Frame(Kind.DATA, ID, 0, values=sums.tobytes(), blocks=2).seal(KEY, "x", "t")
    assert hear(target, frame, sender="x") == []
    fail = Frame(Kind.FAIL, ID, text=b"no").seal(KEY, "x", "t")
    assert hear(target, fail, sender="x") == []
    assert held(target)["fetches"] == 1


@pytest.mark.parametrize("cut", [0, 3, 20])
def test_a_short_frame_is_no_frame(cut):
    sent = Frame(Kind.BEAT).seal(KEY, "s", "t")
    with pytest.raises(TransferError):
        Frame.unseal(sent[:cut], KEY, "s", "t")


def test_a_frame_for_another_receiver_is_refused():
    sent = Frame(Kind.BYE).seal(KEY, "s", "t")
    with pytest.raises(TransferError):
        Frame.unseal(sent, KEY, "s", "u")


class Source:
    """Offers blocks 0 and 1 to "t", in a piece a layer, and hears it ask."""

    def __init__(self):
        settings = Settings(piece_bytes=16, silence_s=1.0)
        self.end = Endpoint("s", KEY, LAYOUT, 8, settings=settings)
        self.end.meet("t", 0.0)
        self.end.offer(Offer(id=ID, blocks=[0, 1]), 0.0)
        blocks = np.array([4, 5], np.uint64).tobytes()
        self.hear(Frame(Kind.ASK, ID, values=blocks, text=b"9000"))
        while self.end.pump():
            pass
        self.writes = [e for e in self.end.outbox.effects if isinstance(e, Write)]
        self.said()

    def hear(self, frame, now=0.0):
        self.end.heard("t", frame.seal(KEY, "t", "s"), now)

    def said(self):
        """What it says since this was asked last, but for greetings."""
        effects = list(self.end.outbox.effects)
        self.end.outbox.effects.clear()
        frames = [effect.frame.kind for effect in effects if isinstance(effect, Send)]
        return [kind for kind in frames if kind not in (Kind.HELLO, Kind.BEAT)]


@pytest.mark.parametrize("asks", [False, True])
def test_a_target_hears_that_it_may_reuse_its_blocks_when_no_write_can_land(asks):
    source = Source()
    assert len(source.writes) == 2
    source.end.tick(2.0)  # it hangs; what is on the way to it lands when it wakes
    assert [type(r).__name__ for r in source.end.outbox.reports] == [
        "TransferEnded",
        "BlocksFreed",
    ]
    assert source.end.sources.writing_to() == {"t"}
    if asks:
        source.hear(Frame(Kind.ABORT, ID, text=b"the deadline passed"), 2.1)
    first, second = source.writes
    source.end.wrote(first.token, None, 2.2)
    assert source.said() == []
    source.end.goodbye()
    assert source.said() == []
    source.end.wrote(second.token, None, 2.3)
    assert source.said() == [Kind.FAIL]
    assert held(source.end)["writes"] == 0
    source.end.goodbye()
    assert source.said() == [Kind.BYE]


def test_a_peer_that_hangs_long_is_asked_to_let_go_now_and_then(target):
    """It may be killed yet, which nothing but a frame to it can find out."""
    sent = []
    for second in range(600):
        target.tick(float(second))
        sent += [(second, e) for e in target.outbox.effects if isinstance(e, Send)]
        target.outbox.effects.clear()
    aborts = [second for second, e in sent if e.frame.kind is Kind.ABORT]
    assert 30 < len(aborts) < 60
    assert max(aborts) > 530


def test_no_traceback_shows_the_key(target):
    assert repr(KEY) not in repr(target)
