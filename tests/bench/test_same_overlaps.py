"""Dynamo finds the same overlaps as llmd in the same data."""

import asyncio
import sys
from pathlib import Path

import pytest

import llmd

pytest.importorskip("dynamo._core")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import _fleet
import route


@pytest.mark.parametrize("contents", [_fleet.conversation, _fleet.stairs])
@pytest.mark.parametrize("size", [40, 512, 2048])
def test_radix_tree(contents, size):
    prompt = _fleet.tokens(size, seed=size)
    held = contents(24, size // _fleet.BLOCK)
    index, tree = _fleet.exact(prompt, held), _fleet.dynamo(prompt, held)
    match = _fleet.dynamo_match(tree)
    ids = _fleet.ids(24)
    other = prompt.copy()
    other[size // 2] += 1  # half the prompt, then something else
    longer = _fleet.tokens(size + 99, seed=1)
    longer[:size] = prompt
    for asked in (prompt, other, longer, prompt[: size // 3 + 1], prompt[1:]):
        request = llmd.Request(id="r", prompt=asked)
        ours = index.match(request, ids, 0.0)[:, 0] // _fleet.BLOCK
        scores = match(asked.tolist()).scores
        theirs = {worker: depth for (worker, _rank), depth in scores.items()}
        assert ours.tolist() == [theirs.get(row, 0) for row in range(24)]


def test_selection_service():
    tokens, workers = 1024, 6
    ours, theirs = route.Llmd(tokens, workers), route.Dynamo(tokens, workers)

    async def compare():
        try:
            await theirs.start()
            for prompt in theirs.prompts:
                request = llmd.Request(id="r", prompt=prompt)
                held = ours.cluster.index.match(request, _fleet.ids(workers), 0.0)
                found = await theirs.overlaps(prompt)
                got = (held[:, 0] // _fleet.BLOCK).tolist()
                assert got == [found[row] for row in range(workers)]
        finally:
            theirs.stop()

    asyncio.run(asyncio.wait_for(compare(), 60))
