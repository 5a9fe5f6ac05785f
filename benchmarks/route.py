"""route.*: from a request's arrival to the commands, its booking included.

Both sides know 24 prompts that share a beginning and are held as in a
conversation, and have 16 requests running.  Each round takes one arrival, with
the making of the `Request` and its hashes, and ends an older one outside of the
clock.  Dynamo's `SelectionService` runs in this process too, gets the same
contents as vLLM's KV events over ZMQ, and takes turns with llmd.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import time
from collections import deque
from typing import Any

import _fleet
import numpy as np
from _timing import no_collection

import llmd
from llmd import events as e

ROUNDS = 300
RUNNING = 16
PROMPTS = 24


def measure() -> dict[str, float]:
    results = {}
    for name, tokens, workers in (
        ("512.w8", 512, 8),
        ("8k.w64", 8192, 64),
        ("8k.w256", 8192, 256),
    ):
        times = Llmd(tokens, workers)
        results[f"route.{name}.us"] = statistics.median(times.run(ROUNDS)) * 1e6
    results["route.w256_over_w64"] = (
        results["route.8k.w256.us"] / results["route.8k.w64.us"]
    )
    for name, tokens, workers in (("512.w8", 512, 8), ("8k.w64", 8192, 64)):
        own, theirs = asyncio.run(_in_turns(tokens, workers))
        results[f"route.{name}.dynamo.us"] = theirs * 1e6
        results[f"route.{name}.ratio"] = theirs / own
    return results


def prompts(tokens: int) -> list[Any]:
    common = _fleet.tokens(tokens, seed=1)
    found = []
    for seed in range(PROMPTS):
        own = _fleet.tokens(tokens, seed=10 + seed)
        own[: tokens // 8] = common[: tokens // 8]
        found.append(own)
    return found


def held(number: int, workers: int, blocks: int) -> list[int]:
    """Say what each worker holds of prompt *number*."""
    depths = _fleet.conversation(workers, blocks)
    return [*np.roll(depths, 7 * number)]


class Llmd:
    """A cluster with contents, and arrivals to time."""

    def __init__(self, tokens: int, workers: int) -> None:
        self.cluster = llmd.Cluster()
        for id in _fleet.ids(workers):
            worker = llmd.Worker(id=id, block_tokens=_fleet.BLOCK, kv_blocks=1 << 20)
            self.cluster.handle(e.WorkerJoined(0.0, worker))
        self.prompts = prompts(tokens)
        for number, prompt in enumerate(self.prompts):
            names = llmd.Prompt.of(prompt).hashes(_fleet.BLOCK)
            for id, blocks in zip(
                _fleet.ids(workers), held(number, workers, len(names)), strict=True
            ):
                stored = e.BlocksStored(0.0, id, names[:blocks], _fleet.BLOCK)
                self.cluster.handle(stored)
        self.now = 1.0
        self.count = itertools.count()
        self.running: deque[tuple[str, llmd.Request]] = deque()

    def arrive(self) -> float:
        """Return the seconds of one arrival, and end an older request."""
        number = next(self.count)
        prompt = self.prompts[number % PROMPTS]
        self.now += 0.01
        start = time.perf_counter()
        request = llmd.Request(id=f"r{number}", prompt=prompt)
        (command,) = self.cluster.handle(e.RequestArrived(self.now, request))
        taken = time.perf_counter() - start
        self.running.append((command.decision.decode, request))
        if len(self.running) > RUNNING:
            worker, old = self.running.popleft()
            self.cluster.handle(e.FirstToken(self.now, worker, old.id))
            self.cluster.handle(e.RequestEnded(self.now, worker, old.id))
        return taken

    def run(self, rounds: int) -> list[float]:
        for _ in range(rounds // 4):
            self.arrive()
        with no_collection():
            return [self.arrive() for _ in range(rounds)]


class Dynamo:
    """A `SelectionService` with the same contents."""

    def __init__(self, tokens: int, workers: int) -> None:
        import zmq

        self.context = zmq.Context()
        self.sockets = [self.context.socket(zmq.PUB) for _ in range(workers)]
        self.prompts = [prompt.tolist() for prompt in prompts(tokens)]
        self.running: deque[str] = deque()
        self.count = itertools.count()

    async def start(self) -> None:
        import msgspec

        os.environ.setdefault("DYN_LOG", "error")
        from dynamo._core import SelectionService

        self.service = SelectionService(indexer_threads=1)
        for worker, socket in enumerate(self.sockets):
            port = socket.bind_to_random_port("tcp://127.0.0.1")
            await self.service.upsert_worker(_record(worker, port))
        await asyncio.sleep(1.0)  # a PUB socket drops what nobody subscribed to yet
        for number, prompt in enumerate(self.prompts):
            blocks = len(prompt) // _fleet.BLOCK
            depths = held(number, len(self.sockets), blocks)
            for socket, depth in zip(self.sockets, depths, strict=True):
                event = _stored(number, prompt, int(depth), blocks // 8)
                payload = msgspec.msgpack.encode([0.0, [event], 0])
                sequence = number.to_bytes(8, "big")
                socket.send_multipart([b"", sequence, payload])
        await self._settled()

    async def _settled(self) -> None:
        """Wait until the last prompt's contents are known there."""
        last = self.prompts[-1]
        blocks = len(last) // _fleet.BLOCK
        want = sorted(held(len(self.prompts) - 1, len(self.sockets), blocks))
        for _ in range(200):
            if sorted((await self.overlaps(last)).values()) == want:
                return
            await asyncio.sleep(0.05)
        raise RuntimeError("Dynamo did not take the events in")

    async def overlaps(self, prompt: list[int]) -> dict[int, int]:
        """Return the leading blocks each worker holds."""
        request = {"model_name": "m", "routing_group": "default", "token_ids": prompt}
        scores = await self.service.overlap_scores(request)
        return {row["worker_id"]: row["device_blocks"] for row in scores["workers"]}

    async def arrive(self) -> float:
        number = next(self.count)
        id = f"s{number}"
        request = {
            "selection_id": id,
            "model_name": "m",
            "routing_group": "default",
            "token_ids": self.prompts[number % PROMPTS],
        }
        start = time.perf_counter()
        await self.service.select_and_reserve(request)
        taken = time.perf_counter() - start
        self.running.append(id)
        if len(self.running) > RUNNING:
            await self.service.free_reservation(self.running.popleft())
        return taken

    def stop(self) -> None:
        self.service.shutdown()
        self.context.destroy(linger=0)


async def _in_turns(tokens: int, workers: int) -> tuple[float, float]:
    """Return the median seconds of an arrival, llmd's and Dynamo's."""
    ours, theirs = Llmd(tokens, workers), Dynamo(tokens, workers)
    try:
        await theirs.start()
        for _ in range(ROUNDS // 4):
            ours.arrive()
            await theirs.arrive()
        with no_collection():
            pairs = [(ours.arrive(), await theirs.arrive()) for _ in range(ROUNDS)]
    finally:
        theirs.stop()
    return statistics.median(a for a, _ in pairs), statistics.median(
        b for _, b in pairs
    )


def _record(worker: int, port: int) -> dict[str, Any]:
    return {
        "worker_id": worker,
        "model_name": "m",
        "routing_group": "default",
        "endpoint": f"http://w{worker}",
        "block_size": _fleet.BLOCK,
        "data_parallel_start_rank": 0,
        "data_parallel_size": 1,
        "kv_events_endpoint": f"tcp://127.0.0.1:{port}",
        "total_kv_blocks": 1 << 20,
        "max_num_batched_tokens": 8192,
    }


def _stored(number: int, prompt: list[int], depth: int, shared: int) -> dict[str, Any]:
    """Return vLLM's event: equal prefixes have equal hashes, as in engines."""
    keys = [
        place + 1 if place < shared else (number + 1 << 32) + place
        for place in range(depth)
    ]
    return {
        "type": "BlockStored",
        "block_hashes": keys,
        "parent_block_hash": None,
        "token_ids": prompt[: depth * _fleet.BLOCK],
        "block_size": _fleet.BLOCK,
        "lora_id": None,
        "medium": "GPU",
    }
