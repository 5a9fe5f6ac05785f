"""The contracts of indexes catch indexes that are wrong."""

import time

import numpy as np
import pytest

import llmd
from llmd import Tier
from llmd.testing import ExactIndexContract, PrefixIndexContract

UNSEEDED = np.random.default_rng()


class TestExact(ExactIndexContract):
    def make(self):
        return llmd.ExactIndex()


class Told(llmd.PrefixIndex):
    """An exact index in a few lines, slow and right."""

    def __init__(self):
        self.sizes = {}
        self.held = {}

    def join(self, worker, at):
        self.sizes[worker.id] = worker.block_tokens
        self.held[worker.id] = set()

    def leave(self, worker, at):
        self.sizes.pop(worker, None)
        self.held.pop(worker, None)

    def forget(self, worker, reason, at):
        if worker in self.held:
            self.held[worker] = set()

    def store(self, worker, hashes, block_tokens, tier, at):
        self.held[worker] |= {(tier, name) for name in hashes.tolist()}

    def remove(self, worker, hashes, tier, at):
        if worker in self.held:
            self.held[worker] -= {(tier, name) for name in hashes.tolist()}

    def match(self, request, workers, at):
        rows = [[self.depth(request, id, tier) for tier in Tier] for id in workers]
        return np.array(rows, dtype=np.int64).reshape(len(workers), len(Tier))

    def depth(self, request, worker, slowest):
        size, held = self.sizes.get(worker, 16), self.held.get(worker, set())
        for block, name in enumerate(request.hashes(size).tolist()):
            if not any((tier, name) in held for tier in Tier if tier <= slowest):
                return block * size
        return len(request.hashes(size)) * size


class Zeros(Told):
    def match(self, request, workers, at):
        return np.zeros((len(workers), len(Tier)), dtype=np.int64)


class Generous(Told):
    """Rounds up to the whole prompt."""

    def depth(self, request, worker, slowest):
        held = super().depth(request, worker, slowest)
        return request.prompt_tokens if held else 0


class Halving(Told):
    def depth(self, request, worker, slowest):
        return super().depth(request, worker, slowest) // 2


class OneForAll(Told):
    """Takes what one worker holds for what all hold."""

    def depth(self, request, worker, slowest):
        return max((super(OneForAll, self).depth(request, w, slowest)) for w in "abc")


class Elephant(Told):
    def forget(self, worker, reason, at):
        pass


class Hoarder(Told):
    def remove(self, worker, hashes, tier, at):
        pass


class OneSize(Told):
    def join(self, worker, at):
        super().join(worker, at)
        self.sizes[worker.id] = 16


class OneTier(Told):
    def store(self, worker, hashes, block_tokens, tier, at):
        super().store(worker, hashes, block_tokens, Tier.GPU, at)


class Unsteady(Told):
    def depth(self, request, worker, slowest):
        whole = super().depth(request, worker, Tier.GPU)
        return whole if UNSEEDED.random() < 0.5 else whole // 2


class Timed(Told):
    def store(self, worker, hashes, block_tokens, tier, at):
        self.stored = time.time_ns()
        super().store(worker, hashes, block_tokens, tier, at)


class Lucky(Told):
    def match(self, request, workers, at):
        return super().match(request, workers, at) + np.random.randint(2) // 2


class TestTold(ExactIndexContract):
    def make(self):
        return Told()


@pytest.mark.parametrize(
    ("index", "test"),
    [
        (Zeros, "test_finds_what_was_sent_and_stored"),
        (Zeros, "test_counts_exactly_what_was_stored"),
        (Zeros, "test_counts_whole_blocks_of_each_size"),
        (Zeros, "test_counts_each_tier_with_the_faster_ones"),
        (Zeros, "test_counts_no_more_what_was_removed"),
        (Zeros, "test_counts_from_nothing_after_forgetting"),
        (Generous, "test_finds_what_was_sent_and_stored"),
        (Generous, "test_counts_exactly_what_was_stored"),
        (Halving, "test_counts_exactly_what_was_stored"),
        (OneForAll, "test_finds_what_was_sent_and_stored"),
        (OneForAll, "test_counts_exactly_what_was_stored"),
        (OneForAll, "test_a_stranger_holds_nothing"),
        (Elephant, "test_finds_what_was_sent_and_stored"),
        (Elephant, "test_forgets_what_it_is_told_to"),
        (Elephant, "test_counts_from_nothing_after_forgetting"),
        (Hoarder, "test_counts_no_more_what_was_removed"),
        (OneSize, "test_counts_whole_blocks_of_each_size"),
        (OneTier, "test_counts_each_tier_with_the_faster_ones"),
        (Unsteady, "test_is_deterministic"),
        (Timed, "test_uses_no_clock_and_no_global_randomness"),
        (Lucky, "test_uses_no_clock_and_no_global_randomness"),
    ],
)
def test_a_wrong_index_is_caught(index, test):
    class Contract(ExactIndexContract):
        def make(self):
            return index()

    with pytest.raises(AssertionError):
        getattr(Contract(), test)()


class BlindGuess(llmd.GuessedIndex):
    """Hears of requests and learns nothing."""

    def expect(self, worker, request, at):
        pass


@pytest.mark.parametrize("index", [BlindGuess, Zeros])
def test_one_that_finds_nothing_is_no_index_of_any_kind(index):
    class Contract(PrefixIndexContract):
        def make(self):
            return index()

    with pytest.raises(AssertionError, match="0 of"):
        Contract().test_finds_what_was_sent_and_stored()
