"""The cache model: against a simple model of itself, and against public figures."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from llmd.sim.cache import BlockCache


class SlowCache:
    """Blocks in one list, oldest first; all look-ups by search."""

    def __init__(self, capacity):
        self.capacity, self.order = capacity, []

    def use(self, names, blank, spent):
        hits = 0
        while hits < len(names) and names[hits] in self.order:
            hits += 1
        for name in names[:hits]:
            self.order.remove(name)
        keep = self.capacity - len(names) - blank - spent
        self.order = self.order[len(self.order) - max(min(keep, len(self.order)), 0) :]
        # Blank ones are taken first: they are in nobody's way.
        self.order += [object() for _ in range(spent)] + list(reversed(names))
        return hits


@given(
    st.integers(2, 12),
    st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(0, 6), st.integers(0, 1), st.integers(0, 2)
        )
    ),
)
@settings(deadline=None)
def test_one_request_at_a_time_is_an_lru_of_blocks(capacity, uses):
    cache, slow = BlockCache(capacity), SlowCache(capacity)
    for chain, depth, blank, spent in uses:
        # Chains share their first two blocks.
        names = [n if n < 2 else 100 * (chain + 1) + n for n in range(depth)]
        blank = min(blank, capacity)
        spent = min(spent, capacity - blank)
        names = names[: capacity - blank - spent]
        hits = cache.held(names)
        assert hits == slow.use(names, blank, spent)
        cache.pin(names[:hits])
        cache.take(len(names) - hits + blank + spent)
        fresh = cache.label(names[hits:])
        assert fresh == names[hits:]
        cache.check()
        cache.release(names, blank, spent)
        cache.check()
        assert cache.used_blocks == 0


def serve(workload, capacity_blocks, block_tokens=512):
    """Return the token-weighted hit rate of one cache, a request at a time."""
    cache = BlockCache(capacity_blocks)
    hits = total = 0
    for job in workload:
        tokens = job.request.prompt_tokens
        blocks = min(-(-tokens // block_tokens), capacity_blocks)
        names = job.request.hashes(block_tokens).tolist()[:blocks]
        hit = cache.held(names[: (tokens - 1) // block_tokens])
        cache.pin(names[:hit])
        cache.take(blocks - hit)
        fresh = cache.label(names[hit:])
        # There the last block of a prompt has a name and a turn like all others.
        cache.release(names[:hit] + fresh, spent=blocks - hit - len(fresh))
        total += tokens
        hits += hit * block_tokens
    return hits / total


# Published beside the traces: token-weighted, one shared LRU.
CONVERSATION = {
    1_000: 0.045,
    2_000: 0.055,
    5_000: 0.114,
    10_000: 0.216,
    30_000: 0.332,
    10_000_000: 0.374,
}
FIRST_1000 = {100: 0.255, 2_000: 0.295, 5_000: 0.329, 10_000_000: 0.391}


@pytest.mark.parametrize("blocks", CONVERSATION)
def test_hit_rate_of_the_conversation_trace(conversation, blocks):
    assert serve(conversation, blocks) == pytest.approx(CONVERSATION[blocks], abs=0.005)


@pytest.mark.parametrize("blocks", FIRST_1000)
def test_hit_rate_of_the_first_thousand(first1000, blocks):
    assert serve(first1000, blocks) == pytest.approx(FIRST_1000[blocks], abs=0.005)
