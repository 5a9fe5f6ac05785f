"""Frames that say again, late or wrongly what was said before."""

import attrs
import numpy as np
import pytest

from llmd.errors import TransferError
from llmd.transport import Endpoint, Fetch, Frame, Kind, Layout, TransferId
from llmd.transport.local import held, multilinear

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
    frame = Frame(Kind.DATA, "r", 1, of_layer, values=sums, blocks=2)
    return attrs.evolve(frame, **changes).seal(KEY, "s", "t")


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
        {"generation": 2},
        {"request": "other"},
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
    frame = Frame(Kind.DATA, "r", 1, 0, values=sums, blocks=2).seal(KEY, "x", "t")
    assert hear(target, frame, sender="x") == []
    fail = Frame(Kind.FAIL, "r", 1, text=b"no").seal(KEY, "x", "t")
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
