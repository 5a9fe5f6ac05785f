"""index.match.*: hash a prompt and find who holds how much of it.

Both sides go from the tokens of a new prompt to overlaps of 64 workers: llmd
from an int array or a list to an array over workers, the making of a `Request`
included; Dynamo from a list to its `OverlapScores`, and in `scores` to the dict
that Python reads them from.  Several prompts take turns, so that nothing is
remembered of the last one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import _fleet
from _timing import in_turns

import llmd

WORKERS = 64
SIZES = {"1k": 1024, "8k": 8192, "32k": 32_768, "131k": 131_072}
PROMPTS = 8


def measure() -> dict[str, float]:
    results: dict[str, float] = {}
    for name, size in SIZES.items():
        results |= _measure(f"index.match.{name}", size, _fleet.conversation)
    for name in ("1k", "8k"):
        stairs = _measure(f"index.match.{name}.stairs", SIZES[name], _fleet.stairs)
        results |= stairs
    return results


def _measure(
    name: str, size: int, contents: Callable[[int, int], list[int]]
) -> dict[str, float]:
    common = _fleet.tokens(size, seed=1)
    prompts = []
    for seed in range(PROMPTS):
        own = _fleet.tokens(size, seed=10 + seed)
        own[: size // 8] = common[: size // 8]
        prompts.append(own)
    held = contents(WORKERS, size // _fleet.BLOCK)
    ids = _fleet.ids(WORKERS)
    index = _fleet.exact(prompts[0], held)
    tree = _fleet.dynamo(prompts[0], held)
    for prompt in prompts[1:]:
        _add(index, tree, prompt, held)
    match = _fleet.dynamo_match(tree)
    arrays, lists = (
        itertools.cycle(prompts),
        itertools.cycle([prompt.tolist() for prompt in prompts]),
    )

    def from_array() -> Any:
        return index.match(llmd.Request(id="r", prompt=next(arrays)), ids, 0.0)

    def from_list() -> Any:
        return index.match(llmd.Request(id="r", prompt=next(lists)), ids, 0.0)

    repeat = max(1, 65_536 // size)
    array_s, list_s, rival_s, scores_s = in_turns(
        from_array,
        from_list,
        lambda: match(next(lists)),
        lambda: match(next(lists)).scores,
        repeat=min(repeat, 40),
    )
    return {
        f"{name}.us": array_s * 1e6,
        f"{name}.list.us": list_s * 1e6,
        f"{name}.dynamo.us": rival_s * 1e6,
        f"{name}.ratio": rival_s / array_s,
        f"{name}.list.ratio": rival_s / list_s,
        f"{name}.scores.ratio": scores_s / array_s,
    }


def _add(index: llmd.ExactIndex, tree: Any, prompt: Any, held: list[int]) -> None:
    """Let both hold another prompt, whose first part they hold already."""
    import json

    from dynamo._core import compute_block_hash_for_seq

    names = llmd.Prompt.of(prompt).hashes(_fleet.BLOCK)
    theirs = compute_block_hash_for_seq(prompt.tolist(), _fleet.BLOCK)
    shared = len(names) // 8
    for worker, (id, blocks) in enumerate(zip(_fleet.ids(len(held)), held)):  # noqa: B905
        index.store(id, names[:blocks], _fleet.BLOCK, llmd.Tier.GPU, 0.0)
        if blocks > shared:
            first = hash((prompt[-1], prompt[-2])) & 0xFFFF_FFFF
            stored = [
                {"block_hash": (first << 20) + place, "tokens_hash": name}
                for place, name in enumerate(theirs[shared:blocks])
            ]
            data = {"stored": {"parent_hash": shared, "blocks": stored}}
            event = {"event_id": 2, "data": data}
            tree.apply_event(worker, json.dumps(event).encode())
