"""The decoder of vLLM's KV events, without vLLM: frames in, reports out."""

import itertools
import random

import numpy as np
import pytest

msgspec = pytest.importorskip("msgspec")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from llmd.adapters.vllm.kv_events import END, Gap, KVEventDecoder  # noqa: E402
from llmd.errors import InvalidSnapshot  # noqa: E402
from llmd.events import BlocksCleared, BlocksRemoved, BlocksStored  # noqa: E402
from llmd.hashing import Hasher  # noqa: E402
from llmd.types import Request, Tier, WorkerId  # noqa: E402

SIZE = 4


def frames(sequence, *events, rank=0, replay=False):
    batch = msgspec.msgpack.encode([1.5, list(events), rank])
    live = [b"kv@pod", sequence.to_bytes(8, "big"), batch]
    return [b"", *live] if replay else live


def stored(hashes, tokens, parent=None, size=SIZE, **more):
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": parent,
        "token_ids": list(tokens),
        "block_size": size,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        **more,
    }


def removed(*hashes, **more):
    return {
        "type": "BlockRemoved",
        "block_hashes": list(hashes),
        "medium": "GPU",
        **more,
    }


CLEARED = {"type": "AllBlocksCleared"}


def names(tokens, size=SIZE, **fields):
    return Request(id="r", prompt=list(tokens), **fields).hashes(size).tolist()


@pytest.fixture
def decoder():
    return KVEventDecoder(WorkerId("w"))


def held(reports, into=None):
    """Return {tier: names} after *reports*."""
    into = {tier: set() for tier in Tier} if into is None else into
    for report in reports:
        if isinstance(report, BlocksStored):
            into[report.tier].update(report.hashes.tolist())
        elif isinstance(report, BlocksRemoved):
            into[report.tier].difference_update(report.hashes.tolist())
        else:
            for known in into.values():
                known.clear()
    return into


class TestNames:
    def test_chained_blocks_are_named_as_requests_name_them(self, decoder):
        tokens = range(100, 124)
        (first,) = decoder.feed(frames(0, stored([1, 2, 3], tokens[:12])), 7.0)
        (rest,) = decoder.feed(
            frames(1, stored([4], tokens[12:16], 3), stored([5, 6], tokens[16:], 4)),
            8.0,
        )
        assert first.hashes.tolist() + rest.hashes.tolist() == names(tokens)
        assert (first.at, rest.at) == (7.0, 8.0)
        assert (first.worker, first.block_tokens, first.tier) == ("w", SIZE, Tier.GPU)
        assert first.hashes.dtype == np.uint64

    @pytest.mark.parametrize(
        ("fields", "more"),
        [
            ({"salt": "s"}, {"extra_keys": [["s"], None]}),
            (
                {"lora": "l"},
                {"lora_name": "l", "lora_id": 1, "extra_keys": [["l"]] * 2},
            ),
            (
                {"lora": "l", "salt": "s"},
                {"lora_name": "l", "lora_id": 1, "extra_keys": [["l", "s"], ["l"]]},
            ),
            (
                {"lora": "x", "salt": "x"},
                {"lora_name": "x", "lora_id": 1, "extra_keys": [["x", "x"], ["x"]]},
            ),
        ],
    )
    def test_salt_and_adapter_enter_the_name(self, decoder, fields, more):
        tokens = range(12)
        (first,) = decoder.feed(frames(0, stored([1, 2], tokens[:8], **more)), 0.0)
        later = {**more, "extra_keys": more["extra_keys"][1:]}
        (rest,) = decoder.feed(frames(1, stored([3], tokens[8:], 2, **later)), 0.0)
        assert first.hashes.tolist() + rest.hashes.tolist() == names(tokens, **fields)
        assert set(names(tokens)).isdisjoint(names(tokens, **fields))

    @pytest.mark.parametrize(
        "more",
        [
            {"extra_keys": [[b"embedding"], None]},
            {"extra_keys": [["salt", b"embedding"], None]},
            {"extra_keys": [None, ["no salt in a second block"]]},
            {"extra_keys": [None, [["image", "3"]]]},
            {"lora_id": 3},
        ],
    )
    def test_what_tokens_do_not_say_gets_no_name(self, decoder, more):
        assert decoder.feed(frames(0, stored([1, 2], range(8), **more)), 0.0) == []
        assert decoder.feed(frames(1, stored([3], range(4), 2)), 0.0) == []
        assert decoder.counts["unnamed blocks"] == 3

    @pytest.mark.parametrize("salt", ["", "s"])
    def test_media_enter_the_name_where_they_begin(self, decoder, salt):
        """As vLLM tells of them: in each block that they reach into."""
        tokens = range(20)
        media = ((6, "cat"), (10, "dog"))
        first = [*[salt] * bool(salt)]
        keys = [first or None, [["cat", 2]], [["cat", -2], ["dog", 2]], [["dog", -2]]]
        (one,) = decoder.feed(
            frames(0, stored([1, 2], tokens[:8], extra_keys=keys[:2])), 0.0
        )
        (two,) = decoder.feed(
            frames(1, stored([3, 4], tokens[8:16], 2, extra_keys=keys[2:])), 0.0
        )
        (three,) = decoder.feed(frames(2, stored([5], tokens[16:], 4)), 0.0)
        told = [*one.hashes, *two.hashes, *three.hashes]
        assert told == names(tokens, media=media, salt=salt)
        plain = names(tokens, salt=salt)
        assert told[0] == plain[0]
        assert set(told[1:]).isdisjoint(plain)
        for other in (((6, "cat"),), ((7, "cat"), (10, "dog")), ((6, "dog"),)):
            assert told[1:] != names(tokens, media=other, salt=salt)[1:]

    def test_a_child_of_an_unknown_parent_gets_no_name(self, decoder):
        assert decoder.feed(frames(0, stored([1], range(4), 99)), 0.0) == []
        assert decoder.counts["unnamed blocks"] == 1

    def test_block_sizes_may_differ_from_event_to_event(self, decoder):
        tokens = range(26)
        reports = decoder.feed(
            frames(
                0,
                stored([1], tokens[:2], size=2),
                stored([2, 3], tokens[2:10], 1, size=4),
                stored([4], tokens[10:26], 3, size=16),
            ),
            0.0,
        )
        expected = [names(tokens, 2)[i] for i in (0, 2, 4, 12)]
        assert np.concatenate([r.hashes for r in reports]).tolist() == expected
        assert [r.block_tokens for r in reports] == [2, 4, 16]

    def test_hashes_of_bytes_serve_as_well(self, decoder):
        one, two = b"1" * 32, b"2" * 32
        decoder.feed(
            frames(0, stored([one], range(4)), stored([two], range(4, 8), one)), 0
        )
        (gone,) = decoder.feed(frames(1, removed(two)), 0.0)
        assert gone.hashes.tolist() == names(range(8))[1:]

    def test_tiers_and_blocks_named_by_hash_alone(self, decoder):
        decoder.feed(frames(0, stored([1, 2], range(8))), 0.0)
        bare = stored([2, 77], [], size=0, medium="CPU")
        (copy,) = decoder.feed(frames(1, bare), 0.0)
        assert (copy.tier, copy.hashes.tolist()) == (Tier.CPU, names(range(8))[1:])
        assert copy.block_tokens == SIZE
        (gone,) = decoder.feed(frames(2, removed(2)), 0.0)
        assert gone.tier == Tier.GPU
        # Its child is still nameable, through the copy in the CPU's memory.
        (child,) = decoder.feed(frames(3, stored([3], range(8, 12), 2)), 0.0)
        assert child.hashes.tolist() == names(range(12))[2:]
        (gone,) = decoder.feed(frames(4, removed(2, medium="CPU")), 0.0)
        assert gone.tier == Tier.CPU
        media = {"STORAGE": Tier.DISK, "elsewhere": Tier.REMOTE}
        for sequence, (medium, tier) in enumerate(media.items(), 5):
            event = stored([8], range(4), medium=medium)
            (report,) = decoder.feed(frames(sequence, event), 0.0)
            assert report.tier == tier

    def test_only_the_group_of_whole_prefixes_counts(self, decoder):
        window = {"group_idx": 0, "kv_cache_spec_kind": "sliding_window"}
        whole = {"group_idx": 1, "kv_cache_spec_kind": "full_attention"}
        (report,) = decoder.feed(
            frames(
                0, stored([1], range(4), **window), stored([1, 2], range(8), **whole)
            ),
            0.0,
        )
        assert report.hashes.tolist() == names(range(8))
        assert decoder.feed(frames(1, removed(1, group_idx=0)), 0.0) == []
        assert len(decoder.feed(frames(2, removed(1, group_idx=1)), 0.0)) == 1


class TestRemovals:
    def test_a_name_leaves_with_its_last_copy(self, decoder):
        event = stored([1], range(4))
        decoder.feed(frames(0, event, event, event), 0.0)
        assert decoder.feed(frames(1, removed(1), removed(1)), 0.0) == []
        (gone,) = decoder.feed(frames(2, removed(1)), 0.0)
        assert gone.hashes.tolist() == names(range(4))
        assert decoder.feed(frames(3, removed(1)), 0.0) == []

    def test_order_within_a_batch_is_kept(self, decoder):
        event = stored([1], range(4))
        reports = decoder.feed(frames(0, event, removed(1), event), 0.0)
        assert [type(r) for r in reports] == [BlocksStored, BlocksRemoved, BlocksStored]

    def test_clear_forgets_parents_and_copies(self, decoder):
        event = stored([1], range(4))
        decoder.feed(frames(0, event, event), 0.0)
        (clear, again) = decoder.feed(
            frames(1, CLEARED, stored([2], range(4, 8), 1), event), 0.0
        )
        assert clear == BlocksCleared(0.0, WorkerId("w"))
        assert again.hashes.tolist() == names(range(4))
        assert len(decoder.feed(frames(2, removed(1)), 0.0)) == 1

    def test_the_bound_is_kept_and_what_leaves_is_reported(self):
        decoder = KVEventDecoder(WorkerId("w"), blocks_kept=64)
        known = None
        for k in range(500):
            event = stored([k], [k, k + 1, k + 2, k + 3])
            known = held(decoder.feed(frames(k, event), 0.0), known)
            assert len(known[Tier.GPU]) <= 64
        assert names([499, 500, 501, 502])[0] in known[Tier.GPU]
        assert decoder.counts["blocks beyond the bound"] == 500 - len(known[Tier.GPU])


class TestSequence:
    def test_a_gap_asks_for_a_replay_and_is_closed_by_it(self, decoder):
        batches = [stored([k], range(4 * k, 4 * k + 4)) for k in range(4)]
        decoder.feed(frames(0, batches[0]), 0.0)
        late = frames(3, batches[3])
        assert decoder.feed(late, 0.0) == []
        assert decoder.gap == Gap(0, 1, 3)
        told = []
        for k in (1, 2, 3):
            told += decoder.feed(frames(k, batches[k], replay=True), 0.0, replayed=True)
        assert decoder.feed([b"", b"", END, b""], 0.0, replayed=True) == []
        assert decoder.feed(late, 0.0, final=True) == []
        assert decoder.gap is None
        assert [type(r) for r in told] == [BlocksStored] * 3
        assert len(decoder.feed(frames(4, removed(3)), 0.0)) == 1

    def test_replays_of_three_frames_are_read_too(self, decoder):
        (report,) = decoder.feed(
            frames(0, stored([1], range(4)), replay=True)[::2][:1]
            + frames(0, stored([1], range(4)))[1:],
            0.0,
            replayed=True,
        )
        assert report.hashes.tolist() == names(range(4))

    def test_what_no_replay_has_is_lost_and_clears(self, decoder):
        decoder.feed(frames(0, stored([1], range(4))), 0.0)
        late = frames(9, stored([2], range(4)))
        assert decoder.feed(late, 0.0) == []
        clear, report = decoder.feed(
            frames(7, stored([3], range(8, 12))), 0.0, replayed=True
        )
        assert isinstance(clear, BlocksCleared)
        assert "1 to 6" in clear.reason
        assert isinstance(report, BlocksStored)
        clear, report = decoder.feed(late, 0.0, final=True)
        assert "8 to 8" in clear.reason
        assert report.hashes.tolist() == names(range(4))
        assert decoder.counts["lost batches"] == 7

    def test_a_restart_is_a_new_generation(self, decoder):
        decoder.feed(frames(0, stored([1], range(4))), 0.0)
        decoder.feed(frames(1, stored([2], range(4, 8), 1)), 0.0)
        clear, report = decoder.feed(
            frames(0, stored([1], range(8, 12)), stored([3], range(4), 2)), 0.0
        )
        assert "restarted" in clear.reason
        assert report.hashes.tolist() == names(range(8, 12)), "old parents are unknown"
        assert decoder.gap is None

    def test_a_restart_whose_first_batches_are_missed_is_both(self, decoder):
        for k in range(6):
            decoder.feed(frames(k, stored([k], range(k, k + 4))), 0.0)
        (clear,) = decoder.feed(frames(2, stored([9], range(4))), 0.0)
        assert isinstance(clear, BlocksCleared)
        assert decoder.gap == Gap(0, 0, 2)

    def test_live_batches_that_a_replay_brought_before_are_skipped(self, decoder):
        for k in range(5):
            decoder.feed(
                frames(k, stored([k], range(k, k + 4)), replay=True), 0.0, replayed=True
            )
        assert decoder.feed(frames(3, stored([3], range(3, 7))), 0.0) == []
        assert decoder.feed(frames(4, stored([4], range(4, 8))), 0.0) == []
        assert len(decoder.feed(frames(5, stored([5], range(5, 9))), 0.0)) == 1
        assert decoder.counts["restarts"] == 0

    def test_ranks_count_for_themselves_and_share_names(self, decoder):
        event = stored([1], range(4))
        own = stored([2], range(4, 8))
        decoder.feed(frames(0, event, rank=0), 0.0)
        decoder.feed(frames(0, event, own, rank=1), 0.0)
        assert decoder.feed(frames(1, removed(1), rank=0), 0.0) == []
        (gone,) = decoder.feed(frames(1, removed(1), rank=1), 0.0)
        assert gone.hashes.tolist() == names(range(4))
        decoder.feed(frames(2, event, rank=0), 0.0)
        clear, still = decoder.feed(frames(3, CLEARED, rank=0), 0.0)
        assert isinstance(clear, BlocksCleared)
        assert still.hashes.tolist() == names(range(4, 8)), "rank 1 holds it still"
        assert decoder.feed(frames(9, event, rank=1), 0.0) == []
        assert decoder.gap == Gap(1, 2, 9)

    def test_forget_starts_over(self, decoder):
        decoder.feed(frames(0, stored([1], range(4))), 0.0)
        assert decoder.forget(3.0, "why") == [BlocksCleared(3.0, WorkerId("w"), "why")]
        assert len(decoder.feed(frames(0, stored([1], range(4))), 0.0)) == 1


class TestDump:
    def known(self):
        decoder = KVEventDecoder(WorkerId("w"))
        decoder.feed(frames(0, stored([1, 2], range(8))), 0.0)
        decoder.feed(frames(1, stored([1], range(4))), 0.0)  # a second copy
        decoder.feed(frames(2, stored([b"9"], range(4), medium="CPU")), 0.0)
        decoder.feed(frames(0, stored([7], range(50, 54)), rank=1), 0.0)
        return decoder

    def test_another_process_goes_on_where_the_first_was(self):
        first, second = self.known(), KVEventDecoder(WorkerId("w"))
        second.restore(first.dump())
        for batch in (
            frames(0, stored([1, 2], range(8)), replay=True),  # seen already
            frames(3, removed(1), stored([3], range(8, 12), 2)),
            frames(4, removed(1, 2, 3), removed(b"9", medium="CPU")),
            frames(1, stored([8], range(54, 58), 7), removed(7), rank=1),
        ):
            replayed = len(batch) == 4
            one, two = (
                held(decoder.feed(batch, 1.0, replayed=replayed))
                for decoder in (first, second)
            )
            assert one == two
            assert second.gap is None
        assert first.dump() == second.dump()

    def test_what_was_missed_meanwhile_is_a_gap(self):
        second = KVEventDecoder(WorkerId("w"))
        second.restore(self.known().dump())
        assert second.feed(frames(5, removed(1)), 1.0) == []
        assert second.gap == Gap(0, 3, 5)

    def test_a_damaged_dump_and_one_of_another_key_are_refused(self):
        data = self.known().dump()
        decoder = KVEventDecoder(WorkerId("w"))
        for bad in (data[:-1], b"?" + data[1:], data[:40] + b"?" + data[41:], b""):
            with pytest.raises(InvalidSnapshot):
                decoder.restore(bad)
        other = KVEventDecoder(WorkerId("w"), hasher=Hasher(bytes(16)))
        with pytest.raises(InvalidSnapshot, match="key"):
            other.restore(data)


class TestGarbage:
    @pytest.mark.parametrize(
        "bad",
        [
            [],
            [b"x"],
            [b"t", b"short", b""],
            [b"t", bytes(8), b""],
            [b"t", bytes(8), b"\xc1"],
            [b"t", bytes(8), msgspec.msgpack.encode(7)],
            [b"t", bytes(8), msgspec.msgpack.encode([1.0])],
            [b"t", bytes(8), msgspec.msgpack.encode([1.0, 3, 0])],
            [b"t", bytes(8), msgspec.msgpack.encode([1.0, [], -4])],
            [b"t", bytes(8), msgspec.msgpack.encode([1.0, [], "x"])],
            [b"t", bytes(8), b"\x91" * 100_000],
        ],
    )
    def test_frames_that_are_no_batch_change_nothing(self, decoder, bad):
        assert decoder.feed(bad, 0.0) == []
        assert decoder.counts == {"undecodable batches": 1}
        assert len(decoder.feed(frames(0, stored([1], range(4))), 0.0)) == 1

    @pytest.mark.parametrize(
        "bad",
        [
            7,
            {},
            {"type": "BlockStored"},
            stored([1], range(5)),
            stored([1], range(4), size=0),
            stored([1], range(4), size=-4),
            stored([1], ["a"] * 4),
            stored([1], [0.5] * 4),
            stored([1], [1 << 63] * 4 + [1 << 64 - 1]),
            stored([[1]], range(4)),
            stored([1], range(4), [1]),
            stored([1], range(4), extra_keys=7),
            stored([1], range(4), medium=[1]),
            {**removed(), "block_hashes": 7},
        ],
    )
    def test_events_that_make_no_sense_are_skipped(self, decoder, bad):
        reports = decoder.feed(frames(0, bad, stored([5], range(4))), 0.0)
        assert [r.hashes.tolist() for r in reports] == [names(range(4))]
        assert decoder.counts["malformed events"] == 1

    def test_unknown_types_and_fields_are_counted_or_ignored(self, decoder):
        (report,) = decoder.feed(
            frames(0, {"type": "BlockMoved"}, stored([1], range(4), colour="red")), 0.0
        )
        assert report.hashes.tolist() == names(range(4))
        assert decoder.counts["unknown events"] == 1

    def test_a_batch_may_be_a_map(self, decoder):
        batch = {"ts": 1.0, "events": [stored([1], range(4))]}
        payload = msgspec.msgpack.encode(batch)
        assert len(decoder.feed([b"", bytes(8), payload], 0.0)) == 1


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)
some_events = st.one_of(
    junk,
    st.builds(
        lambda base, changes: {**base, **changes},
        st.sampled_from([stored([1, 2], range(8)), removed(1), CLEARED]),
        st.dictionaries(
            st.sampled_from([*stored([], []), "group_idx", "extra_keys", "locality"]),
            junk,
            max_size=3,
        ),
    ),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.binary(max_size=10), st.integers(0, 5)),
            st.one_of(st.binary(max_size=30), st.lists(some_events, max_size=4)),
            st.booleans(),
        ),
        max_size=8,
    )
)
def test_nothing_that_arrives_breaks_it(batches):
    decoder = KVEventDecoder(WorkerId("w"))
    for sequence, events, replayed in batches:
        number = (
            sequence if isinstance(sequence, bytes) else sequence.to_bytes(8, "big")
        )
        payload = (
            events
            if isinstance(events, bytes)
            else msgspec.msgpack.encode([0.0, events, 0])
        )
        for report in decoder.feed([b"", number, payload], 0.0, replayed=replayed):
            assert isinstance(report, BlocksStored | BlocksRemoved | BlocksCleared)
    decoder.forget(0.0, "")
    (report,) = decoder.feed(frames(0, stored([1], range(4))), 0.0)
    assert report.hashes.tolist() == names(range(4))


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 12))
def test_reports_say_what_an_engine_holds(rng: random.Random, capacity):
    """Against a model of a cache with copies, whatever happens in it."""
    decoder = KVEventDecoder(WorkerId("w"))
    known = held([])
    slots: list[tuple[int, ...]] = []
    keys: dict[tuple[int, ...], int] = {}
    for sequence in range(30):
        events = []
        for _ in range(rng.randrange(4)):
            if slots and (len(slots) >= capacity or rng.random() < 0.2):
                prefix = slots.pop(rng.randrange(len(slots)))
                events.append(removed(keys[prefix]))
            elif rng.random() < 0.05:
                slots.clear()
                events.append(CLEARED)
            else:
                parent = rng.choice([(), *slots])
                tokens = [rng.randrange(3) for _ in range(SIZE)]
                prefix = parent + tuple(tokens)
                slots.append(prefix)
                key = keys.setdefault(prefix, len(keys))
                events.append(stored([key], tokens, keys.get(parent)))
        known = held(decoder.feed(frames(sequence, *events), 0.0), known)
        assert known[Tier.GPU] == {names(prefix)[-1] for prefix in slots}


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_lost_batches_never_leave_a_claim_too_many(data):
    """With batches lost and replays cut short, no name is kept that is gone."""
    count = data.draw(st.integers(2, 12))
    batches, truth, alive = [], [], {}
    for k in range(count):
        event = stored([k], range(4 * k, 4 * k + 4))
        events = [event]
        alive[k] = names(range(4 * k, 4 * k + 4))[0]
        if alive and data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(sorted(alive)))
            del alive[gone]
            events.append(removed(gone))
        batches.append(frames(k, *events))
        truth.append(set(alive.values()))
    decoder, known = KVEventDecoder(WorkerId("w")), held([])
    oldest = data.draw(st.integers(0, count))
    arrive = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    for k in arrive:
        reports = decoder.feed(batches[k], 0.0)
        if decoder.gap:
            wanted = range(max(decoder.gap.start, oldest), k + 1)
            for again in wanted:
                reports += decoder.feed([b"", *batches[again]], 0.0, replayed=True)
            reports += decoder.feed(batches[k], 0.0, final=True)
        known = held(reports, known)
        assert known[Tier.GPU] <= truth[k]
        if oldest == 0:
            assert known[Tier.GPU] == truth[k]


def test_long_chains_agree_with_requests_across_events(decoder):
    rng = random.Random(5)
    tokens = [rng.randrange(150_000) for _ in range(16 * 300)]
    cuts = sorted({0, 300, *(rng.randrange(300) for _ in range(40))})
    found = []
    for sequence, (a, b) in enumerate(itertools.pairwise(cuts)):
        event = stored(range(a, b), tokens[16 * a : 16 * b], a - 1 if a else None, 16)
        for report in decoder.feed(frames(sequence, event), 0.0):
            found += report.hashes.tolist()
    assert found == names(tokens, 16)
