"""The same contents for llmd's index and for Dynamo's."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import llmd
from llmd import Tier

BLOCK = 16


def ids(workers: int) -> tuple[str, ...]:
    """Return worker ids whose order is that of their numbers."""
    return tuple(f"w{number:03}" for number in range(workers))


def tokens(count: int, seed: int = 0) -> NDArray[np.int64]:
    """Return a prompt of random token ids of a 128k vocabulary."""
    return np.random.default_rng(seed).integers(0, 128_000, count)


def conversation(workers: int, blocks: int) -> list[int]:
    """Say how many leading blocks each worker holds of a turn of a conversation.

    All hold the system prompt, an eighth; every eighth worker holds half, as
    other conversations branched off there; one holds seven eighths, the turns
    before.
    """
    held = [blocks // 8] * workers
    for number in range(0, workers, 8):
        held[number] = blocks // 2
    held[workers // 3] = blocks * 7 // 8
    return held


def stairs(workers: int, blocks: int) -> list[int]:
    """Say the same of a prompt with eight depths, each of an eighth of the fleet."""
    return [blocks * (number % 8 + 1) // 8 for number in range(workers)]


def exact(prompt: NDArray[np.int64], held: list[int]) -> llmd.ExactIndex:
    """Return an index that holds what *held* says."""
    index = llmd.ExactIndex()
    names = llmd.Prompt.of(prompt).hashes(BLOCK)
    for worker, blocks in zip(ids(len(held)), held, strict=True):
        index.join(llmd.Worker(id=worker, block_tokens=BLOCK), 0.0)
        index.store(worker, names[:blocks], BLOCK, Tier.GPU, 0.0)
    return index


def dynamo(prompt: NDArray[np.int64], held: list[int]) -> Any:
    """Return Dynamo's radix tree, holding the same.

    Raises:
        ImportError: `ai-dynamo-runtime` is not installed.
    """
    from dynamo._core import RadixTree, compute_block_hash_for_seq

    names = compute_block_hash_for_seq(prompt.tolist(), BLOCK)
    tree = RadixTree()
    for worker, blocks in enumerate(held):
        stored = [
            {"block_hash": place + 1, "tokens_hash": name}
            for place, name in enumerate(names[:blocks])
        ]
        data = {"stored": {"parent_hash": None, "blocks": stored}}
        tree.apply_event(worker, json.dumps({"event_id": 1, "data": data}).encode())
    return tree


def dynamo_match(tree: Any) -> Callable[[list[int]], Any]:
    """Return a call from tokens to Dynamo's overlaps."""
    from dynamo._core import compute_block_hash_for_seq

    def match(prompt: list[int]) -> Any:
        return tree.find_matches(compute_block_hash_for_seq(prompt, BLOCK))

    return match
