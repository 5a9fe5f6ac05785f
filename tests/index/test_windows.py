"""Sliding windows: what is usable is asked of every block, not bisected."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

import llmd
from llmd import Tier
from llmd import events as e
from llmd.index import windows


@given(held=st.lists(st.booleans(), max_size=24), reach=st.integers(1, 6))
def test_depth_is_the_longest_prefix_whose_window_is_held(held, reach):
    names = np.arange(1, len(held) + 1, dtype=np.uint64)
    masks = {place + 1: 4 for place, there in enumerate(held) if there}
    want = 0
    for depth in range(1, len(held) + 1):
        if all(held[max(depth - reach, 0) : depth]):
            want = depth
    assert windows.depth(masks.get, names, 4, reach) == want


def test_a_prefix_whose_head_was_freed_still_counts():
    cluster = llmd.Cluster()
    for id in ("full", "sliding"):
        cluster.handle(e.WorkerJoined(0.0, llmd.Worker(id=id)))
    request = llmd.Request(id="r", prompt=range(160))
    names = request.hashes(16)
    cluster.handle(e.BlocksStored(0.0, "sliding", names[6:], 16, window_tokens=64))
    cluster.handle(e.BlocksStored(0.0, "full", names[6:], 16))
    held = cluster.index.match(request, ("full", "sliding"), 0.0)
    assert held[:, Tier.GPU].tolist() == [0, 160]
    cluster.handle(e.BlocksRemoved(0.0, "sliding", names[7:8]))
    held = cluster.index.match(request, ("full", "sliding"), 0.0)
    assert held[:, Tier.GPU].tolist() == [0, 0]
    cluster.handle(e.BlocksRemoved(0.0, "sliding", names[9:]))
    cluster.handle(e.BlocksStored(0.0, "sliding", names[5:8], 16, window_tokens=64))
    held = cluster.index.match(request, ("full", "sliding"), 0.0)
    assert held[:, Tier.GPU].tolist() == [0, 144]
