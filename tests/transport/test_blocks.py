"""Blocks are copied and checksummed alike in C and in Python."""

import gc

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

xxhash = pytest.importorskip("xxhash")

from llmd.adapters.nixl.blocks import (  # noqa: E402
    Xxh3,
    copy_for,
    copy_in_python,
    packed,
    sums_for,
    sums_in_python,
    xxh3,
)
from llmd.adapters.nixl.copiers import Copiers  # noqa: E402
from llmd.adapters.nixl.shared import Mapped  # noqa: E402
from llmd.adapters.nixl.slab import Slab  # noqa: E402
from llmd.native import loops  # noqa: E402
from llmd.transport import Layout  # noqa: E402
from llmd.transport.handshake import Address  # noqa: E402

compiled = pytest.mark.skipif(loops is None, reason="no compiled loops here")
LAYERS, BLOCKS = 2, 8
BOTH = [copy_for(256, summed=True), copy_in_python]


def int32(*numbers):
    return np.array(numbers, np.int32)


def layers_of(block_bytes, seed=1):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (LAYERS, BLOCKS, block_bytes), dtype=np.uint8)


def bases_of(array):
    return packed(layer.ctypes.data for layer in array)


def digests(array, blocks):
    found = [
        xxhash.xxh3_64_intdigest(layer[block].tobytes())
        for layer in array
        for block in blocks
    ]
    return np.array(found, np.uint64).tobytes()


@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7))),
    st.sampled_from([1, 63, 64, 240, 241, 256, 1024, 1025, 4096, 5000]),
    st.booleans(),
)
def test_a_copy_does_what_its_twin_does(pairs, block_bytes, summed):
    source = layers_of(block_bytes)
    come, go = int32(*[a for a, _ in pairs]), int32(*[b for _, b in pairs])
    targets = [np.zeros_like(source), np.zeros_like(source)]
    found = [
        copy(
            *(bases_of(source), come, bases_of(target), go),
            *(block_bytes, BLOCKS, summed),
        )
        for copy, target in zip(
            (copy_for(block_bytes, summed=summed), copy_in_python), targets, strict=True
        )
    ]
    assert (targets[0] == targets[1]).all()
    wanted = digests(source, come) if summed else None
    assert found == [wanted, wanted]


@given(
    st.integers(1, 6000),
    st.integers(0, 2**32),
    st.lists(st.integers(0, BLOCKS - 1), max_size=5),
)
def test_checksums_are_those_of_xxhash(block_bytes, seed, blocks):
    array, chosen = layers_of(block_bytes, seed), int32(*blocks)
    wanted = digests(array, blocks)
    for sums in sums_for(block_bytes), sums_in_python:
        assert sums(bases_of(array), chosen, block_bytes, BLOCKS) == wanted
    assert xxh3(array, chosen).tobytes() == wanted


@compiled
def test_long_blocks_are_checksummed_in_c():
    assert sums_for(241) is loops.block_sums
    assert copy_for(241, summed=True) is loops.copy_blocks
    assert copy_for(1, summed=False) is loops.copy_blocks
    assert copy_for(240, summed=True) is copy_in_python
    assert sums_for(240) is sums_in_python


@pytest.mark.parametrize("copy", BOTH)
@pytest.mark.parametrize(
    ("come", "go"), [((0, 0), (0,)), ((0,), (1,)), ((0,), (-1,)), ((), (0,))]
)
@pytest.mark.parametrize("summed", [False, True])
def test_copies_that_cannot_be_are_refused(copy, come, go, summed):
    block = np.ones((1, 1, 256), np.uint8)
    target = np.zeros_like(block)
    with pytest.raises(ValueError, match="block"):
        copy(
            *(bases_of(block), int32(*come), bases_of(target), int32(*go)),
            *(256, 1, summed),
        )
    assert not target.any()


@pytest.mark.parametrize("copy", BOTH)
def test_as_many_layers_here_as_there(copy):
    block = np.ones((2, 1, 256), np.uint8)
    with pytest.raises(ValueError, match="as many"):
        copy(
            *(bases_of(block), int32(0), bases_of(block[:1]), int32(0)),
            *(256, 1, False),
        )


@pytest.mark.parametrize("sums", [sums_for(256), sums_in_python])
@pytest.mark.parametrize("block", [-1, BLOCKS])
def test_a_block_that_is_not_there_has_no_checksum(sums, block):
    array = layers_of(256)
    with pytest.raises(ValueError, match="not one of 8"):
        sums(bases_of(array), int32(block), 256, BLOCKS)


@compiled
def test_short_blocks_are_not_for_c():
    array = layers_of(240)
    with pytest.raises(ValueError, match="too short"):
        loops.block_sums(bases_of(array), int32(0), 240, BLOCKS)
    with pytest.raises(TypeError):
        loops.block_sums(bases_of(array), int32(0), 240)
    with pytest.raises(TypeError, match="blocks of 4"):
        loops.block_sums(bases_of(array), np.array([0]), 256, BLOCKS)
    with pytest.raises(TypeError):
        loops.copy_blocks(None, int32(0), bases_of(array), int32(0), 256, 1, False)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_several_threads_copy_what_one_does(count, summed):
    layout = Layout(
        model="m", dtype="u8", layers=3, block_tokens=1, block_bytes=1 << 16
    )
    rng = np.random.default_rng(2)
    source = rng.integers(0, 256, (3, 64, 1 << 16), dtype=np.uint8)
    target = Slab.allocate(layout, 64)
    mapped = Mapped.of(
        Address(
            id="a",
            layout=layout,
            blocks=64,
            bases=target.bases,
            shared=target.shared.where(),
        )
    )
    come, go = (rng.permutation(64)[:61].astype(np.int32) for _ in range(2))
    copiers = Copiers(count)
    sums = copiers.copy(mapped, bases_of(source), 0, come, go, summed=summed)
    copiers.close()
    assert (target.owner[:, go] == source[:, come]).all()
    wanted = sums_in_python(bases_of(source), come, 1 << 16, 64)
    assert sums == (wanted if summed else None)


def test_of_many_copies_one_that_cannot_be_is_an_error_when_none_moves_any_more():
    layout = Layout(
        model="m", dtype="u8", layers=1, block_tokens=1, block_bytes=1 << 20
    )
    target = Slab.allocate(layout, 8)
    address = Address(
        id="a",
        layout=layout,
        blocks=8,
        bases=target.bases,
        shared=target.shared.where(),
    )
    copiers, source = Copiers(4), np.ones((1, 8, 1 << 20), np.uint8)
    with pytest.raises(ValueError, match="not one of 8"):
        copiers.copy(
            *(Mapped.of(address), bases_of(source), 0),
            *(int32(*range(8)), int32(*range(1, 9))),
            summed=True,
        )
    copiers.close()


def test_what_checksums_a_slab_keeps_its_memory():
    layout = Layout(model="m", dtype="u8", layers=1, block_tokens=1, block_bytes=4096)
    slab = Slab.allocate(layout, 4)
    slab.owner[:] = 5
    sums, wanted = slab.sums, digests(slab.owner, [2])
    del slab
    gc.collect()
    assert sums(0, 1, int32(2)) == wanted


def test_blocks_may_be_any_integers_where_a_slab_is_asked():
    array = layers_of(256)
    sums = Xxh3(bases_of(array), 256, BLOCKS)
    assert sums(0, 2, np.array([2, 3])) == digests(array, [2, 3])
    assert sums(1, 2, np.array([7, 0, 1])[::2]) == digests(array[1:], [7, 1])
