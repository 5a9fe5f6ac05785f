"""index.events.*: apply the KV events of an engine, as decoded msgpack gives them.

From `KVEventDecoder.apply`, which names the blocks from their tokens, to the
index: events of 32 blocks of 16 tokens, and events of one block, batch by batch.
Dynamo gets the same blocks, hashed already and as JSON, which is what its
Python interface takes; so its side hashes nothing.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import _fleet
from _timing import no_collection

import llmd
from llmd.adapters.vllm.kv_events import KVEventDecoder
from llmd.events import BlocksStored

PROMPTS = 400
BLOCKS = 32
ROUNDS = 9


def measure() -> dict[str, float]:
    long = [_event(number, BLOCKS) for number in range(PROMPTS)]
    short = [event for number in range(40) for event in _single(number, BLOCKS)]
    long_s = _median(lambda: _apply(long))
    short_s = _median(lambda: _apply(short))
    blocks = PROMPTS * BLOCKS
    results = {
        "index.events.blocks_per_s": blocks / long_s,
        "index.events.single_per_s": len(short) / short_s,
    }
    dynamo_s = _median(lambda: _apply_dynamo(long))
    results["index.events.dynamo.blocks_per_s"] = blocks / dynamo_s
    results["index.events.ratio"] = dynamo_s / long_s
    return results


def _event(number: int, blocks: int) -> dict[str, Any]:
    tokens = _fleet.tokens(blocks * _fleet.BLOCK, seed=number).tolist()
    return {
        "type": "BlockStored",
        "block_hashes": [number * 1000 + place for place in range(blocks)],
        "parent_block_hash": None,
        "token_ids": tokens,
        "block_size": _fleet.BLOCK,
        "lora_id": None,
        "medium": "GPU",
    }


def _single(number: int, blocks: int) -> list[dict[str, Any]]:
    """Return the same blocks as a decoding engine tells of them, one by one."""
    whole = _event(number, blocks)
    events = []
    for place in range(blocks):
        first = place * _fleet.BLOCK
        events.append(
            {
                **whole,
                "block_hashes": [whole["block_hashes"][place]],
                "parent_block_hash": whole["block_hashes"][place - 1]
                if place
                else None,
                "token_ids": whole["token_ids"][first : first + _fleet.BLOCK],
            }
        )
    return events


def _apply(events: list[dict[str, Any]]) -> float:
    """Return the seconds to apply *events* to a new index, one a batch."""
    decoder = KVEventDecoder("w000")
    index = llmd.ExactIndex()
    index.join(llmd.Worker(id="w000", block_tokens=_fleet.BLOCK), 0.0)
    start = time.perf_counter()
    for event in events:
        for report in decoder.apply((event,), 0.0):
            assert isinstance(report, BlocksStored)
            index.store(
                report.worker, report.hashes, report.block_tokens, report.tier, 0.0
            )
    return time.perf_counter() - start


def _apply_dynamo(events: list[dict[str, Any]]) -> float:
    from dynamo._core import RadixTree, compute_block_hash_for_seq

    hashed = [
        compute_block_hash_for_seq(event["token_ids"], _fleet.BLOCK) for event in events
    ]
    tree = RadixTree()
    start = time.perf_counter()
    for number, (event, names) in enumerate(zip(events, hashed, strict=True)):
        blocks = [
            {"block_hash": key, "tokens_hash": name}
            for key, name in zip(event["block_hashes"], names, strict=True)
        ]
        data = {"stored": {"parent_hash": None, "blocks": blocks}}
        tree.apply_event(0, json.dumps({"event_id": number, "data": data}).encode())
    tree.find_matches(hashed[-1])  # events are queued: wait for the last
    return time.perf_counter() - start


def _median(call: Any) -> float:
    call()
    with no_collection():
        return statistics.median(call() for _ in range(ROUNDS))
