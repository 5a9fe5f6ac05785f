"""Why is the overlap zero?  Each cause that users met, in words."""

import pytest

import llmd
from llmd import Tier


@pytest.fixture
def index():
    index = llmd.ExactIndex(grace=0.0)
    index.join(llmd.Worker(id="a", block_tokens=16, loras=["known"]), 0.0)
    return index


def ask(tokens=64, **names):
    return llmd.Request(id="r", prompt=range(tokens), **names)


def says(index, request, *words, at=10.0, worker="a"):
    findings = index.diagnose(request, worker, at)
    for word in words:
        assert any(word in finding for finding in findings), findings


def test_prompt_under_a_block(index):
    says(index, ask(7), "7 tokens, under one block of 16")


def test_block_size_differs(index):
    index.store("a", ask().hashes(32)[:0], 32, Tier.GPU, 1.0)
    says(index, ask(), "block size differs", "joined with 16", "have 32")


def test_no_event_ever(index):
    says(index, ask(), "no KV event of it was ever heard")


def test_no_events_for_a_while(index):
    index.store("a", ask().hashes(16)[:1], 16, Tier.GPU, 2.0)
    says(index, ask(), "holds 16 of 64", "no KV events for 8 s")


def test_gap(index):
    index.store("a", ask().hashes(16), 16, Tier.GPU, 2.0)
    index.doubt("a", "batches 3 to 9 of rank 0 are lost", 4.0)
    says(index, ask(), "dropped 6 s ago (batches 3 to 9 of rank 0 are lost)")


def test_cleared(index):
    index.store("a", ask().hashes(16), 16, Tier.GPU, 2.0)
    index.forget("a", "", 4.0)
    says(index, ask(), "it cleared its cache")


def test_salt_differs(index):
    index.store("a", ask().hashes(16), 16, Tier.GPU, 2.0)
    says(index, ask(salt="tenant"), "under the salt '', not 'tenant'")


def test_another_salt_than_the_one_it_was_sent_with(index):
    index.expect("a", ask(salt="one"), 0.0)
    index.settle("a", ask(salt="one"), 0, 0.0)
    index.store("a", ask(salt="one").hashes(16), 16, Tier.GPU, 2.0)
    says(index, ask(salt="two"), "under the salt 'one', not 'two'")


def test_adapter_unknown(index):
    says(index, ask(lora="other"), "does not serve the adapter 'other'")


def test_adapter_differs(index):
    index.store("a", ask().hashes(16), 16, Tier.GPU, 2.0)
    says(index, ask(lora="known"), "for the adapter '', not 'known'")


def test_evicted(index):
    index.store("a", ask().hashes(16), 16, Tier.GPU, 2.0)
    index.remove("a", ask().hashes(16)[2:], Tier.GPU, 7.0)
    says(index, ask(), "the block after token 32 was evicted 3 s ago")


def test_never_seen(index):
    other = llmd.Request(id="o", prompt=range(500, 600))
    index.store("a", other.hashes(16), 16, Tier.GPU, 9.0)
    says(index, ask(), "never told of the block after token 0")


def test_all_is_well(index):
    index.store("a", ask().hashes(16), 16, Tier.GPU, 9.0)
    assert index.diagnose(ask(), "a", 10.0) == [
        "it holds all 4 full blocks of the prompt"
    ]


def test_stranger(index):
    says(index, ask(), "not known here", worker="b")
    says(llmd.GuessedIndex(), ask(), "not known here", worker="b")


def test_guess():
    index = llmd.GuessedIndex()
    index.join(llmd.Worker(id="a"), 0.0)
    says(index, ask(), "nothing was sent to it")
    says(index, ask(20), "under one grain of 64")
    index.expect("a", llmd.Request(id="o", prompt=range(500, 600)), 0.0)
    says(index, ask(), "no prompt that begins like this was sent")
