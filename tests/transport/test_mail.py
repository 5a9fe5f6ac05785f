"""Messages through memory: in order, whole, never more than fit, nonsense refused."""

import os
import subprocess
import sys
import threading
import time
from array import array

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

pytest.importorskip("xxhash")

from llmd.native import loops

if loops is None or not hasattr(os, "memfd_create"):
    pytest.skip("no rings here", allow_module_level=True)

from llmd.adapters.nixl.mail import Mail, MailError

PUT, TAKEN = 64, 0


@pytest.fixture
def both():
    """The writer's end and the reader's."""
    writer = Mail.new()
    reader = Mail.read(writer.where)
    yield writer, reader
    reader.close()


def all_of(reader):
    found = []
    while (message := reader.take()) is not None:
        found.append(message)
    return found


@given(st.lists(st.binary(max_size=70_000), max_size=12), st.data())
def test_messages_come_in_order_whatever_they_are(messages, data):
    writer = Mail.new()
    reader = Mail.read(writer.where)
    sent, got = [], []
    for message in messages:
        if writer.put(message):
            sent.append(message)
        if data.draw(st.booleans()):
            got += all_of(reader)
    got += all_of(reader)
    assert got == sent


def test_nothing_is_put_where_nobody_reads():
    writer = Mail.new()
    assert not writer.put(b"hello")
    reader = Mail.read(writer.where)
    assert writer.put(b"hello")
    reader.close()
    assert not writer.put(b"again")


def test_a_full_ring_takes_no_more_until_something_is_taken(both):
    writer, reader = both
    sent = 0
    while writer.put(bytes(1000)):
        sent += 1
    assert 200 < sent < 300
    assert not writer.put(bytes(1000))
    assert reader.take() == bytes(1000)
    assert writer.put(bytes(1000))
    assert not writer.put(bytes(1 << 18)), "with its length it is too long for any"


@pytest.mark.parametrize(
    ("where", "number"),
    [
        (PUT, 4),
        (PUT, 1 << 40),
        (PUT, 2**64 - 8),
        (TAKEN, 32),
        (192, 1 << 50),
        (192, 2**64 - 1),
        (192, 17),
    ],
)
def test_nonsense_is_an_error_and_no_crash(both, where, number):
    writer, reader = both
    assert writer.put(b"sixteen bytes...")
    writer.memory[where : where + 8] = np.array([number], np.uint64).view(np.uint8)
    with pytest.raises(MailError, match="not a ring"):
        reader.take()


@pytest.mark.parametrize("taken", [1 << 40, 1 << 63])
def test_a_reader_that_tells_nonsense_gets_no_more(both, taken):
    writer, _ = both
    writer.memory[:8] = np.array([taken], np.uint64).view(np.uint8)
    assert not writer.put(b"x")


@pytest.mark.parametrize(
    "where",
    [
        "",
        "7",
        "[1, 2]",
        '[1, 3, "llmd-x", 0]',
        '[1e999, 3, "llmd-x", 0]',
        "[" * 100_000,
    ],
)
def test_what_is_no_ring_is_not_read(where):
    assert Mail.read(where) is None


def test_other_memory_is_no_ring():
    from llmd.adapters.nixl.shared import SharedMemory

    memory = SharedMemory(1 << 12)
    assert Mail.read(memory.where()) is None
    assert not memory.array.any()


READ = """
import sys, time
from llmd.adapters.nixl.mail import Mail
mail = Mail.read(sys.argv[1])
print("reads", flush=True)
until, last = time.monotonic() + 30, -1
while last != 20_000 and time.monotonic() < until:
    message = mail.take()
    if message is not None:
        number = int.from_bytes(message[:8], "little")
        assert number == last + 1
        assert message[8:] == bytes([number % 256]) * (number % 97)
        last = number
print("read", last)
"""


def test_another_process_reads_all_of_it_in_order():
    writer = Mail.new()
    command = [sys.executable, "-c", READ, writer.where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout.readline() == "reads\n"
        until = time.monotonic() + 30
        for number in range(20_001):
            body = bytes([number % 256]) * (number % 97)
            while not writer.put(number.to_bytes(8, "little") + body):
                assert time.monotonic() < until
        assert reader.stdout.read() == "read 20000\n"


def test_who_watches_sees_mail(both):
    writer, reader = both
    bell = array("Q", [0, 0])
    words = array("Q", reader.word)
    assert not loops.watch(words, bell, 1000)
    threading.Timer(0.05, writer.put, [b"x"]).start()
    begun = time.monotonic()
    assert loops.watch(words, bell, 10**10)
    assert time.monotonic() - begun < 5.0
    assert reader.take() == b"x"
    assert not loops.watch(array("Q", reader.word), bell, 1000)


def test_who_watches_hears_the_bell(both):
    _, reader = both
    bell, seen = array("Q", [0, 0]), []
    words = array("Q", reader.word)
    watching = threading.Thread(
        target=lambda: seen.append(loops.watch(words, bell, 10**10))
    )
    watching.start()
    loops.ring(bell, 10**9)
    watching.join(10)
    assert seen == [True]
    assert bell.tolist() == [1, 1]
    assert not loops.watch(words, bell, 1000)


def test_who_rings_does_not_wait_for_long_where_nobody_watches():
    bell = array("Q", [0, 0])
    begun = time.monotonic()
    loops.ring(bell, 10_000)
    assert time.monotonic() - begun < 5.0
    assert bell[0] == 1


def test_bells_and_rings_have_to_be_some():
    with pytest.raises(ValueError, match="bell"):
        loops.ring(array("Q", [0]), 1)
    with pytest.raises(ValueError, match="bell"):
        loops.watch(array("Q"), array("Q", [0]), 1)
    with pytest.raises(ValueError, match="power of two"):
        loops.ring_take(0, 100)
    with pytest.raises(ValueError, match="power of two"):
        loops.ring_put(0, 100, b"")
    with pytest.raises(TypeError):
        loops.ring_put(0, 128)
