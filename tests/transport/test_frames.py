"""Frames become bytes and frames again, alike in C and in Python."""

import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given

from llmd.errors import TransferError
from llmd.native import loops
from llmd.transport import TransferId
from llmd.transport.frames import (
    VERSION,
    Frame,
    Kind,
    pack_in_python,
    unpack_in_python,
)

compiled = pytest.mark.skipif(loops is None, reason="no compiled loops here")


def up_to(bits):
    return st.integers(0, 2**bits - 1)


FRAMES = st.builds(
    Frame,
    st.sampled_from(Kind),
    st.builds(TransferId, st.text(max_size=20), up_to(64)),
    layer=up_to(16),
    attempt=up_to(16),
    start=up_to(32),
    values=st.lists(st.binary(min_size=8, max_size=8), max_size=4).map(b"".join),
    text=st.binary(max_size=20),
    layers=up_to(16),
    blocks=up_to(32),
)


def outcome(of, *arguments):
    """Return what came of a call, or the kind of error that did."""
    try:
        return of(*arguments)
    except (OverflowError, ValueError, TransferError) as error:
        return next(
            kind
            for kind in (OverflowError, ValueError, TransferError)
            if isinstance(error, kind)
        )


def unpacked(body):
    """Return `unpack_in_python`, and the error for what is not known."""
    return unpack_in_python(body) or TransferError


@given(FRAMES)
def test_a_frame_is_what_it_was(frame):
    packed = frame.pack()
    assert packed == pack_in_python(frame)
    for again in Frame.unpack(packed), unpack_in_python(packed):
        assert again == frame
        assert type(again) is Frame
        assert type(again.id) is TransferId
        assert again.kind is frame.kind


@given(FRAMES, st.data())
def test_what_is_damaged_is_taken_alike(frame, data):
    body = bytearray(frame.pack())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at] = data.draw(st.integers(0, 255))
    body = bytes(body[: data.draw(st.integers(0, len(body)))])
    assert outcome(Frame.unpack, body) == outcome(unpacked, body)


@given(st.binary(max_size=80))
def test_bytes_of_anything_are_taken_alike(body):
    assert outcome(Frame.unpack, body) == outcome(unpacked, body)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layer": 1 << 16},
        {"attempt": -1},
        {"layers": 1 << 40},
        {"start": 1 << 32},
        {"blocks": 1 << 64},
        {"id": TransferId("r", 1 << 64)},
        {"id": TransferId("r", -1)},
        {"id": TransferId("r" * (1 << 16), 1)},
    ],
)
def test_what_does_not_fit_is_refused(wrong):
    frame = Frame(Kind.ACK)._replace(**wrong)
    assert outcome(frame.pack) is OverflowError
    assert outcome(pack_in_python, frame) is OverflowError


def test_other_versions_and_kinds_are_refused():
    body = bytearray(Frame(Kind.ACK).pack())
    for at, number in (1, VERSION + 1), (0, 0), (0, len(Kind) + 1), (0, 255):
        other = bytearray(body)
        other[at] = number
        with pytest.raises(TransferError, match="version"):
            Frame.unpack(bytes(other))


@compiled
def test_compiled_frames_leave_nothing_behind():
    id = TransferId("a request", 12_345_678)
    frame = Frame(Kind.DATA, id, values=b"8 bytes!" * 3, text=b"text")
    body = frame.pack()
    forged = body[:34] + b"\xff" + body[35:]  # the name is no UTF-8 any more
    before = sys.getrefcount(Kind.DATA), sys.getrefcount(Frame)
    for _ in range(500):
        Frame.unpack(body)
        frame.pack()
        with pytest.raises(ValueError, match="utf-8"):
            Frame.unpack(forged)
    after = sys.getrefcount(Kind.DATA), sys.getrefcount(Frame)
    assert [b - a for a, b in zip(before, after, strict=True)] == [0, 0]


@compiled
@pytest.mark.parametrize(
    "arguments",
    [
        (1, VERSION),
        ((1, 2), VERSION),
        (tuple(range(9)), VERSION),
        (Frame(Kind.ACK, id=TransferId(7, 1)), VERSION),
        (Frame(Kind.ACK, text="text"), VERSION),
    ],
)
def test_compiled_frames_want_frames(arguments):
    with pytest.raises(TypeError):
        loops.frame_pack(*arguments)


@compiled
def test_compiled_frames_want_types_of_tuples():
    body = Frame(Kind.ACK).pack()
    for kinds, frame, id in (
        ((None, *Kind), list, TransferId),
        ((None, *Kind), Frame, int),
        (list(Kind), Frame, TransferId),
        ((None, *Kind), 1, TransferId),
    ):
        with pytest.raises(TypeError):
            loops.frame_unpack(body, VERSION, kinds, frame, id)
