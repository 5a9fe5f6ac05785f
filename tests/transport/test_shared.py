"""Memory that peers map: only the right one, only whole, gone with who holds it."""

import contextlib
import gc
import json
import os
import subprocess
import sys

import attrs
import numpy as np
import pytest

pytest.importorskip("xxhash")

from llmd.adapters.nixl.blocks import packed
from llmd.adapters.nixl.shared import Mapped, SharedMemory
from llmd.adapters.nixl.slab import Slab
from llmd.errors import TransferError
from llmd.transport import Layout
from llmd.transport.handshake import Address

LAYOUT = Layout(model="m", dtype="u8", layers=2, block_tokens=1, block_bytes=4096)
BLOCKS = 6

pytestmark = pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="no memory to share here"
)


def address_of(slab):
    return Address(
        id="a",
        layout=slab.layout,
        blocks=slab.blocks,
        bases=slab.bases,
        shared=slab.shared.where(),
    )


@pytest.fixture
def slab():
    return Slab.allocate(LAYOUT, BLOCKS)


def int32(*numbers):
    return np.array(numbers, np.int32)


COPY_THERE = """
import sys

import numpy as np

from llmd.adapters.nixl.blocks import packed
from llmd.adapters.nixl.shared import Mapped
from llmd.transport import Layout
from llmd.transport.handshake import Address

layout = Layout(model="m", dtype="u8", layers=2, block_tokens=1, block_bytes=4096)
address = Address.verify(bytes.fromhex(sys.argv[1]), b"k" * 32, layout)
source = np.full((3, 4096), 7, np.uint8)
come, go = np.array([0, 2], np.int32), np.array([5, 3], np.int32)
Mapped.of(address).copy(packed([source.ctypes.data]), 1, come, go)
"""


def test_another_process_copies_blocks_of_a_layer(slab):
    address = address_of(slab).sign(b"k" * 32).hex()
    command = [sys.executable, "-c", COPY_THERE, address]
    subprocess.run(command, check=True, timeout=60)
    assert (slab.owner[1, [3, 5]] == 7).all()
    assert not slab.owner[0].any()
    assert not slab.owner[1, [0, 1, 2, 4]].any()


@pytest.mark.parametrize("block", [-1, BLOCKS])
def test_blocks_that_are_not_there_are_refused_before_any_is_written(slab, block):
    mapped = Mapped.of(address_of(slab))
    source = np.full((2, LAYOUT.block_bytes), 7, np.uint8)
    with pytest.raises(ValueError, match="not one of 6"):
        mapped.copy(packed([source.ctypes.data]), 0, int32(0, 1), int32(2, block))
    assert not slab.owner.any()


def test_what_is_not_that_memory_is_not_mapped(slab, tmp_path):
    address = address_of(slab)
    process, descriptor, name, base = json.loads(address.shared)
    with (tmp_path / "file").open("wb+") as other:
        other.truncate(1 << 20)
        wrong = [
            "",
            "no json",
            "7",
            json.dumps([process, descriptor, "llmd-another", base]),
            json.dumps([process, other.fileno(), name, base]),
            json.dumps([2**31 - 1, descriptor, name, base]),
            json.dumps([process, descriptor, name, base + 1]),
            json.dumps([process, descriptor, name, base - (1 << 30)]),
            json.dumps([process, descriptor]),
        ]
        for shared in wrong:
            assert Mapped.of(attrs.evolve(address, shared=shared)) is None, shared
    more = attrs.evolve(address, blocks=BLOCKS + 1)
    assert Mapped.of(more) is None, "layers that go beyond the memory"
    assert Mapped.of(address) is not None


def test_it_cannot_be_shrunk_under_those_who_map_it(slab):
    _, descriptor, _, _ = json.loads(slab.shared.where())
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 4096)


def test_memory_goes_when_nobody_holds_it():
    slab = Slab.allocate(LAYOUT, BLOCKS)
    _, _, name, _ = json.loads(slab.shared.where())
    mapped = Mapped.of(address_of(slab))
    del slab
    gc.collect()
    assert descriptors_of(name) == 1
    # Still mapped here: a source may copy into what its target has left.
    source = np.zeros((1, LAYOUT.block_bytes), np.uint8)
    mapped.copy(packed([source.ctypes.data]), 0, int32(0), int32(0))
    del mapped
    gc.collect()
    assert descriptors_of(name) == 0


def descriptors_of(name):
    """Count the descriptors of this process for a memory, mappings included."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += name in os.readlink(f"/proc/self/fd/{number}")
    return found


def test_what_the_system_refuses_is_an_error_of_ours(monkeypatch):
    with pytest.raises(TransferError, match="cannot be shared"):
        Slab.allocate(attrs.evolve(LAYOUT, block_bytes=1 << 30), 1 << 40)

    def refuse(*_):
        raise PermissionError("not in this sandbox")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(TransferError, match="sandbox"):
        Slab.allocate(LAYOUT, BLOCKS)


def test_a_slab_that_is_not_in_the_memory_to_be_shared_is_refused():
    elsewhere = np.zeros((2, BLOCKS, LAYOUT.block_bytes), np.uint8)
    with pytest.raises(TransferError, match="does not lie"):
        Slab.of(elsewhere, LAYOUT, shared=SharedMemory(elsewhere.nbytes))


@pytest.mark.parametrize("blocks", [0, -1])
def test_a_slab_of_nothing_is_refused(blocks):
    with pytest.raises(TransferError):
        Slab.allocate(LAYOUT, blocks)
    with pytest.raises(TransferError):
        SharedMemory(blocks)
