"""An index survives as bytes; damaged or foreign bytes are refused."""

import pytest

import llmd
from llmd import Tier, hashing
from llmd.errors import InvalidRequest, InvalidSnapshot
from llmd.index import dump, restore
from llmd.index.interface import PrefixIndex


def ask(start=0):
    return llmd.Request(id="r", prompt=range(start, start + 256))


def filled(index):
    for id in ("a", "b"):
        index.join(llmd.Worker(id=id, kv_blocks=100), 0.0)
    index.store("a", ask().hashes(16), 16, Tier.GPU, 1.0)
    index.store("b", ask().hashes(32)[:3], 32, Tier.CPU, 1.0)
    index.expect("b", ask(1000), 2.0)
    return index


@pytest.mark.parametrize(
    "kind", [llmd.ExactIndex, llmd.GuessedIndex, llmd.BlendedIndex]
)
def test_restored_matches_alike(kind):
    index = filled(kind())
    index.settle("b", ask(1000), 0, 2.0)
    other = restore(dump(index))
    assert type(other) is kind
    other.join(llmd.Worker(id="a", kv_blocks=100), 9.0)
    for start in (0, 1000, 5000):
        want = index.match(ask(start), ("a", "b"), 9.0)
        assert other.match(ask(start), ("a", "b"), 9.0).tolist() == want.tolist()
    other.check()


def test_every_flipped_byte_is_noticed():
    data = dump(filled(llmd.ExactIndex()))
    for place in range(0, len(data), 37):
        broken = bytearray(data)
        broken[place] ^= 1
        with pytest.raises(InvalidSnapshot):
            restore(bytes(broken))


def test_a_cut_dump_is_noticed():
    data = dump(filled(llmd.ExactIndex()))
    for length in (0, 5, 30, len(data) - 1):
        with pytest.raises(InvalidSnapshot):
            restore(data[:length])


def test_names_of_another_key_are_refused():
    data = dump(filled(llmd.ExactIndex()))
    with pytest.raises(InvalidSnapshot, match="share_key"):
        restore(data, hasher=llmd.Hasher(key=bytes(16)))


def test_an_index_of_ones_own_cannot_be_dumped():
    class Own(PrefixIndex):
        def match(self, request, workers, at):
            raise NotImplementedError

    with pytest.raises(InvalidSnapshot, match="Own"):
        dump(Own())


def test_a_key_cannot_change_under_names_that_exist():
    hasher = hashing.process_hasher()
    assert hashing.share_key(hasher.key) is hasher
    with pytest.raises(InvalidRequest):
        hashing.share_key(bytes(16))
    with pytest.raises(InvalidRequest):
        hashing.share_key(b"short")


def test_windows_and_settings_are_dumped_too():
    index = llmd.ExactIndex(grace=9.0, max_blocks=77)
    asked = llmd.Request(id="r", prompt=range(20))
    index.join(llmd.Worker(id="a", block_tokens=1), 0.0)
    index.window("a", 5, 0.0)
    index.store("a", asked.hashes(1)[10:], 1, Tier.GPU, 0.0)
    again = restore(dump(index))
    again.join(llmd.Worker(id="a", block_tokens=1), 0.0)
    assert index.match(asked, ("a",), 0.0)[0, 0] == 20
    assert again.match(asked, ("a",), 0.0)[0, 0] == 20
    assert (again.grace, again.max_blocks) == (9.0, 77)
    assert restore(dump(llmd.GuessedIndex(ttl=5.0))).ttl == 5.0
