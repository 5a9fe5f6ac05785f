"""The contracts of prefix indexes."""

from __future__ import annotations

import abc

import numpy as np

from ..index import PrefixIndex
from ..types import Request, Tier, Worker, WorkerId
from .samples import request
from .seal import sealed


class PrefixIndexContract(abc.ABC):
    """What every `PrefixIndex` must hold to."""

    @abc.abstractmethod
    def make(self) -> PrefixIndex:
        """Return a new index."""

    def filled(self) -> tuple[PrefixIndex, tuple[WorkerId, ...]]:
        """Return an index that was told and hinted things, and its workers."""
        index = self.make()
        ids = ("a", "b", "c")
        for id in ids:
            index.join(Worker(id=id, block_tokens=16), 0.0)
        names = request().hashes(16)
        index.store("a", names, 16, Tier.GPU, 1.0)
        index.store("b", names[:9], 16, Tier.CPU, 1.0)
        index.expect("b", request("sent"), 2.0)
        index.settle("b", request("sent"), 0, 2.5)
        index.expect("c", request("sending"), 3.0)
        return index, ids

    def test_finds_what_was_sent_and_stored(self) -> None:
        """A worker holds a prompt it computed, told of and was asked again.

        Whether an index goes by the requests or by the events, it finds some of
        it, no more than is shared, and nothing of it elsewhere.
        """
        index, sent = self.make(), request("sent", tokens=1024)
        ids = ("a", "b")
        for id in ids:
            index.join(Worker(id=id, block_tokens=16), 0.0)
        for at, cached_tokens in (1.0, 0), (3.0, 1008):
            index.expect("a", sent, at)
            index.store("a", sent.hashes(16), 16, Tier.GPU, at + 0.2)
            index.settle("a", sent, cached_tokens, at + 0.4)
        for asked, shared_tokens in _sharing(1024):
            held = index.match(asked, ids, 9.0)[:, -1]
            assert 0 < held[0] <= shared_tokens, f"{held[0]} of {shared_tokens}"
            assert held[1] == 0, f"{held[1]} of a worker that holds nothing"
        index.forget("a", "a restart", 10.0)
        assert not index.match(sent, ids, 10.0).any(), "it was forgotten"

    def test_counts_tokens_of_every_worker_and_tier(self) -> None:
        """Whole tokens, none negative, none beyond the prompt, more with each tier."""
        index, ids = self.filled()
        for new in (request(), request("short", tokens=5), request("c", start=9000)):
            held = index.match(new, ids, 4.0)
            assert held.shape == (3, len(Tier)), held.shape
            assert held.dtype.kind == "i", held.dtype
            assert (held >= 0).all(), held
            assert (held <= new.prompt_tokens).all(), held
            assert (np.diff(held, axis=1) >= 0).all(), "a slower tier holds less"

    def test_answers_in_the_order_asked(self) -> None:
        """Row i is worker i, whatever workers are asked for."""
        index, ids = self.filled()
        held = index.match(request(), ids, 4.0)
        for order in ((2, 1, 0), (1,), (0, 2), ()):
            asked = tuple(ids[row] for row in order)
            want = [held[row].tolist() for row in order]
            assert index.match(request(), asked, 4.0).tolist() == want

    def test_a_stranger_holds_nothing(self) -> None:
        """A worker that never joined has zeros and does no harm."""
        index, ids = self.filled()
        held = index.match(request(), (*ids, "stranger"), 4.0)
        assert held[3].tolist() == [0] * len(Tier)

    def test_forgets_what_it_is_told_to(self) -> None:
        """A cleared worker holds nothing and may store again."""
        index, ids = self.filled()
        for id in ids:
            index.forget(id, "", 5.0)
        assert not index.match(request(), ids, 5.0).any()
        index.store("a", request().hashes(16), 16, Tier.GPU, 6.0)
        index.expect("a", request("sent"), 6.0)

    def test_a_worker_that_left_is_a_stranger(self) -> None:
        """Late events about it change nothing of the others."""
        index, _ = self.filled()
        index.leave("a", 5.0)
        before = index.match(request(), ("b", "c"), 5.0).tolist()
        index.remove("a", request().hashes(16), Tier.GPU, 5.0)
        index.settle("a", request("sent"), 0, 5.0)
        index.revoke("a", request("sent"), 5.0)
        assert index.match(request(), ("b", "c"), 5.0).tolist() == before
        assert not index.match(request(), ("a",), 5.0).any()

    def test_keeps_salts_and_adapters_apart(self) -> None:
        """What one tenant cached is nothing to another."""
        index, ids = self.filled()
        for other in (request(salt="x"), request(lora="l")):
            assert not index.match(other, ids, 4.0).any()

    def test_is_deterministic(self) -> None:
        """The same calls give the same counts."""
        assert self._counts() == self._counts()

    def test_uses_no_clock_and_no_global_randomness(self) -> None:
        """Time is the `at` it is given."""
        self.make()  # imports what it needs, which may ask for anything
        names = request().hashes(16)
        with sealed():
            self._counts()
            index, _ = self.filled()
            index.diagnose(request(), "a", 4.0)
            index.window("c", 64, 4.0)
            index.revoke("b", request("sent"), 4.0)
            index.remove("a", names[9:], Tier.GPU, 5.0)
            index.doubt("a", "a gap", 6.0)
            index.forget("b", "a restart", 6.0)
            index.leave("c", 6.0)
            index.match(request(), ("a", "b", "c"), 7.0)

    def test_diagnoses_in_words(self) -> None:
        """Findings are sentences, of strangers too."""
        index, _ = self.filled()
        for id in ("a", "b", "c", "stranger"):
            for finding in index.diagnose(request("cold", start=9000), id, 4.0):
                assert isinstance(finding, str), finding
                assert finding, "an empty finding"

    def test_repeats_do_no_harm(self) -> None:
        """Stores and removals may be told twice."""
        index, ids = self.filled()
        names = request().hashes(16)
        index.store("a", names, 16, Tier.GPU, 5.0)
        index.remove("b", names, Tier.CPU, 5.0)
        once = index.match(request(), ids, 5.0).tolist()
        index.store("a", names, 16, Tier.GPU, 5.0)
        index.remove("b", names, Tier.CPU, 5.0)
        assert index.match(request(), ids, 5.0).tolist() == once

    def _counts(self) -> list[list[list[int]]]:
        """Return what an index of its own answers to several requests."""
        index, ids = self.filled()
        return [
            index.match(request(tokens=tokens), ids, 4.0).tolist()
            for tokens in (5, 64, 150, 256, 300, 1000)
        ]


class ExactIndexContract(PrefixIndexContract):
    """What a `PrefixIndex` must hold to that follows events: exact counts."""

    def told(self) -> tuple[PrefixIndex, Request]:
        """Return an index of workers a, b, blocks of 16, and c, blocks of 32."""
        index = self.make()
        for id, block_tokens in (("a", 16), ("b", 16), ("c", 32)):
            index.join(Worker(id=id, block_tokens=block_tokens), 0.0)
        return index, request("told", tokens=1024)

    def test_counts_exactly_what_was_stored(self) -> None:
        """The leading blocks that are stored and shared, on the one worker."""
        for blocks in (0, 1, 7, 64):
            index, told = self.told()
            index.store("a", told.hashes(16)[:blocks], 16, Tier.GPU, 1.0)
            for asked, shared_tokens in _sharing(1024):
                held = index.match(asked, ("a", "b", "stranger"), 9.0)
                want = min(16 * blocks, shared_tokens)
                assert held.tolist() == [[want] * len(Tier), *_nothing(2)], held

    def test_counts_whole_blocks_of_each_size(self) -> None:
        """Workers may have blocks of different sizes."""
        index, told = self.told()
        index.store("a", told.hashes(16)[:5], 16, Tier.GPU, 1.0)
        index.store("c", told.hashes(32)[:5], 32, Tier.GPU, 1.0)
        held = index.match(request(tokens=100), ("a", "b", "c"), 9.0)
        assert held[:, 0].tolist() == [80, 0, 96], held

    def test_counts_each_tier_with_the_faster_ones(self) -> None:
        """Blocks of a slower tier go on where the faster tier ends."""
        index, told = self.told()
        names = told.hashes(16)
        index.store("a", names[:3], 16, Tier.GPU, 1.0)
        index.store("a", names[3:8], 16, Tier.CPU, 1.0)
        index.store("b", names[:2], 16, Tier.CPU, 1.0)
        held = index.match(told, ("a", "b"), 9.0)
        for id, row, gpu, cpu in (("a", 0, 48, 128), ("b", 1, 0, 32)):
            want = [gpu if tier < Tier.CPU else cpu for tier in Tier]
            assert held[row].tolist() == want, f"{id}: {held[row]}"

    def test_counts_no_more_what_was_removed(self) -> None:
        """The tail goes first; the last block to go leaves nothing."""
        index, told = self.told()
        names = told.hashes(16)
        for id in ("a", "b"):
            index.store(id, names, 16, Tier.GPU, 1.0)
        for at, left in enumerate((40, 1, 0), start=2):
            index.remove("a", names[left:], Tier.GPU, float(at))
            held = index.match(told, ("a", "b"), float(at))
            assert held[:, 0].tolist() == [16 * left, 1024], held

    def test_counts_from_nothing_after_forgetting(self) -> None:
        """What is stored later is all there is."""
        index, told = self.told()
        index.store("a", told.hashes(16), 16, Tier.GPU, 1.0)
        index.forget("a", "a restart", 2.0)
        assert index.match(told, ("a",), 2.0).tolist() == _nothing(1)
        index.store("a", told.hashes(16)[:2], 16, Tier.GPU, 3.0)
        assert index.match(told, ("a",), 3.0)[0, 0] == 32


def _sharing(tokens: int) -> list[tuple[Request, int]]:
    """Return requests with how many of the first *tokens* tokens they share."""
    half = Request(id="half", prompt=[*range(tokens // 2), *range(5000, 5300)])
    return [
        (request("same", tokens=tokens), tokens),
        (request("longer", tokens=tokens + 100), tokens),
        (request("shorter", tokens=tokens // 4), tokens // 4),
        (half, tokens // 2),
    ]


def _nothing(workers: int) -> list[list[int]]:
    return [[0] * len(Tier)] * workers
