"""Guesses expire and stay in bounds; the blend follows whoever is right."""

import numpy as np
import pytest

import llmd
from llmd import Tier


def request(id, start=0, tokens=256, **names):
    return llmd.Request(id=id, prompt=range(start, start + tokens), **names)


def worker(id="a", **facts):
    return llmd.Worker(id=id, **{"block_tokens": 16, "kv_blocks": 1000, **facts})


def held(index, asked, id="a", at=0.0):
    return int(index.match(asked, (id,), at)[0, 0])


class TestGuessed:
    def test_forgets_after_its_time(self):
        index = llmd.GuessedIndex(ttl=10.0)
        index.join(worker(), 0.0)
        index.expect("a", request("r"), 0.0)
        assert held(index, request("s"), at=5.0) == 256
        index.expect("a", request("t", start=9000), 11.0)
        assert held(index, request("s"), at=11.0) == 0

    def test_holds_no_more_than_the_worker_can(self):
        index = llmd.GuessedIndex()
        index.join(worker(kv_blocks=32), 0.0)
        for number in range(20):
            index.expect("a", request(f"r{number}", start=1000 * number), float(number))
            index.check()
        assert held(index, request("s", start=19_000)) == 256
        assert held(index, request("s", start=0)) == 0

    def test_what_was_used_last_stays(self):
        index = llmd.GuessedIndex()
        index.join(worker(kv_blocks=48), 0.0)
        for at, start in enumerate([0, 1000, 2000, 0, 3000]):
            index.expect("a", request(f"r{at}", start=start), float(at))
        assert held(index, request("s", start=0)) == 256
        assert held(index, request("s", start=1000)) == 0


class TestHopes:
    def test_a_request_on_its_way_counts_by_steps_of_256_tokens(self):
        index = llmd.ExactIndex()
        index.join(worker(), 0.0)
        index.expect("a", request("r", tokens=300), 0.0)
        assert held(index, request("s", tokens=300)) == 256

    def test_a_hope_ends_a_moment_after_the_first_token(self):
        index = llmd.ExactIndex(grace=1.0)
        index.join(worker(), 0.0)
        index.expect("a", request("r"), 0.0)
        index.settle("a", request("r"), 0, 5.0)
        assert held(index, request("s"), at=5.9) == 256
        assert held(index, request("s"), at=7.0) == 0

    def test_a_request_given_up_is_hoped_for_no_more(self):
        index = llmd.ExactIndex(grace=1.0)
        index.join(worker(), 0.0)
        index.expect("a", request("r"), 0.0)
        index.expect("a", request("also"), 0.0)
        index.revoke("a", request("r"), 0.5)
        assert held(index, request("s"), at=0.5) == 256
        index.revoke("a", request("also"), 0.5)
        assert held(index, request("s"), at=0.5) == 0
        index.revoke("a", request("unknown"), 0.5)
        index.check()

    def test_any_other_event_ends_it_on_time(self):
        index = llmd.ExactIndex(grace=1.0)
        index.join(worker(), 0.0)
        index.expect("a", request("r"), 0.0)
        index.settle("a", request("r"), 0, 5.0)
        index.settle("a", request("other"), 0, 6.0)
        assert held(index, request("s"), at=6.0) == 0

    def test_one_sent_again_before_anything_was_heard_is_hoped_for_once(self):
        index = llmd.ExactIndex(grace=1.0)
        index.join(worker(), 0.0)
        asked = request("r")
        index.expect("a", asked, 0.0)
        index.expect("a", asked, 0.5)
        index.check()
        index.settle("a", asked, 0, 2.0)
        assert held(index, request("s"), at=2.5) == 256
        assert held(index, request("s"), at=4.5) == 0
        index.check()

    def test_a_newer_hope_for_the_same_prefix_outlives_the_older(self):
        index = llmd.ExactIndex(grace=1.0)
        index.join(worker(), 0.0)
        index.expect("a", request("r"), 0.0)
        index.expect("a", request("s"), 1.0)
        index.settle("a", request("r"), 0, 2.0)
        assert held(index, request("t"), at=9.0) == 256
        index.check()


class TestBlended:
    """An engine that really caches, and events that may or may not come."""

    def serve(self, index, asked, at, cached, tell):
        index.expect("a", asked, at)
        if tell:
            index.store("a", asked.hashes(16), 16, Tier.GPU, at + 0.1)
        index.settle("a", asked, cached, at + 0.2)

    def test_events_are_followed_where_they_are_right(self):
        index = llmd.BlendedIndex()
        index.join(worker(), 0.0)
        for number in range(6):
            asked = request(f"r{number}", start=1000 * (number % 3))
            self.serve(index, asked, float(number), 256 if number >= 3 else 0, True)
        assert index.follows("a") == "exact"
        assert index.quality("a")["exact"] == (1.0, 1.0)

    def test_guesses_are_followed_of_an_engine_that_never_tells(self):
        index = llmd.BlendedIndex()
        index.join(worker(), 0.0)
        self.serve(index, request("r"), 0.0, 0, tell=False)
        assert index.follows("a") == "guessed"
        assert held(index, request("s"), at=60.0) == 256

    def test_it_degrades_by_itself_when_events_stop_and_comes_back(self):
        index = llmd.BlendedIndex(grace=1.0)
        index.join(worker(), 0.0)
        for number in range(4):
            asked = request(f"r{number}", start=1000 * (number % 2))
            self.serve(index, asked, float(number), 256 if number >= 2 else 0, True)
        silent = request("x", start=50_000)
        self.serve(index, silent, 10.0, 0, tell=False)
        assert index.follows("a", 10.5) == "exact"  # its event may be on its way
        assert index.follows("a", 12.0) == "guessed"
        assert held(index, request("y", start=50_000), at=12.0) == 256
        assert "told of no block since" in index.diagnose(silent, "a", 12.0)[0]
        self.serve(index, request("z", start=60_000), 13.0, 0, tell=True)
        assert index.follows("a", 20.0) == "exact"

    def test_an_engine_that_told_of_what_it_dropped_is_not_followed(self):
        """Removals are lost: events say all is held, the engine says nothing is."""
        index = llmd.BlendedIndex(guessed=llmd.GuessedIndex(ttl=1.0))
        index.join(worker(), 0.0)
        asked = request("r")
        self.serve(index, asked, 0.0, 0, tell=True)
        for number in range(5):
            at = 10.0 * (number + 1)
            index.guessed.expect("a", request(f"o{number}", start=9000), at)
            self.serve(index, request(f"r{number}"), at, 0, tell=False)
            index.store("a", request("q", start=777).hashes(16), 16, Tier.GPU, at + 1)
        precision, _ = index.quality("a")["exact"]
        assert precision < 0.1
        assert index.quality("a")["guessed"][0] != 1.0

    def test_missed_events_leave_the_guess_in_charge_until_measured(self):
        index = llmd.BlendedIndex()
        index.join(worker(), 0.0)
        for number in range(4):
            asked = request(f"r{number}", start=1000 * (number % 2))
            self.serve(index, asked, float(number), 256 if number >= 2 else 0, True)
        index.doubt("a", "batches 3 to 9 are lost", 5.0)
        assert index.follows("a", 5.0) == "guessed"
        assert held(index, request("s"), at=5.0) == 256
        for number in range(10, 40):
            asked = request(f"r{number}", start=1000 * (number % 2))
            self.serve(index, asked, float(number), 256, tell=True)
        assert index.quality("a")["exact"][1] > 0.8

    def test_a_cleared_cache_clears_both_beliefs(self):
        index = llmd.BlendedIndex()
        index.join(worker(), 0.0)
        self.serve(index, request("r"), 0.0, 0, tell=True)
        index.forget("a", "", 1.0)
        assert held(index, request("s"), at=1.0) == 0

    def test_workers_are_followed_each_for_itself(self):
        index = llmd.BlendedIndex()
        for id in ("a", "b"):
            index.join(worker(id), 0.0)
        index.store("a", request("r").hashes(16)[:4], 16, Tier.GPU, 0.0)
        index.expect("b", request("r"), 0.0)
        assert index.match(request("s"), ("a", "b"), 1.0)[:, 0].tolist() == [64, 256]
        index.check()


def test_memory_is_bounded_though_an_engine_never_evicts():
    index = llmd.ExactIndex(max_blocks=1000)
    index.join(worker(), 0.0)
    names = np.arange(1, 5001, dtype=np.uint64)
    for part in np.split(names, 50):
        index.store("a", part, 16, Tier.GPU, 0.0)
    assert 800 <= len(index.held(1, Tier.GPU)) <= 1000
    assert 5000 in index.held(1, Tier.GPU)


def test_the_log_of_a_worker_is_bounded_too():
    index = llmd.ExactIndex(max_blocks=10_000)
    index.join(worker(), 0.0)
    for turn in range(60):
        names = np.arange(turn * 5000, turn * 5000 + 5000, dtype=np.uint64)
        index.store("a", names, 16, Tier.GPU, float(turn))
    (log,) = index._tiers[Tier.GPU]._logs.values()
    assert len(log) < 4 * 10_000
    index.check()


def test_a_list_of_workers_may_change_between_two_looks():
    index, asked, ids = llmd.ExactIndex(), request("r"), ["a", "b"]
    for id in ids:
        index.join(worker(id), 0.0)
    index.store("a", asked.hashes(16), 16, Tier.GPU, 0.0)
    assert index.match(asked, ids, 0.0)[:, 0].tolist() == [256, 0]
    ids.reverse()
    assert index.match(asked, ids, 0.0)[:, 0].tolist() == [0, 256]


@pytest.mark.parametrize("workers", [1, 7, 64, 65, 200])
def test_any_number_of_workers(workers):
    index = llmd.ExactIndex()
    ids = tuple(f"w{number:03}" for number in range(workers))
    for id in reversed(ids):
        index.join(worker(id), 0.0)
    asked = request("r", tokens=16 * 32)
    for number, id in enumerate(ids):
        index.store(id, asked.hashes(16)[: number % 33], 16, Tier.GPU, 0.0)
    got = index.match(asked, ids, 0.0)
    assert got[:, 0].tolist() == [16 * (number % 33) for number in range(workers)]
    few = ids[::-3]
    assert index.match(asked, few, 0.0)[:, 3].tolist() == [
        16 * (int(id[1:]) % 33) for id in few
    ]
