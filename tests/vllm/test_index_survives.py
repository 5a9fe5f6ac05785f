"""Row 2 of the study: events cut, an engine restarted, block sizes that differ.

In each case requests go on and the index says what is wrong in words.
"""

import asyncio
import os
import signal

import pytest
from tests.vllm.conftest import GREEDY, OPTIONS, prompt, request

import llmd
from llmd.adapters.vllm.engine import VllmEngine
from llmd.adapters.vllm.tiny import make_model
from llmd.live import Server


class To(llmd.Router):
    """Sends requests where it is told, that each engine gets what it should."""

    worker = ""

    def cost(self, request, view):
        return [0.0 if id == self.worker else 1.0 for id in view.workers.ids]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), tokenizer=False)


def engine(model, block_tokens):
    return VllmEngine(model, options={**OPTIONS, "block_size": block_tokens})


async def ask(server, worker, tokens, name):
    """Answer on *worker*; raises if the request fails."""
    server.cluster.router.worker = worker
    asked = request(name, tokens)
    async with asyncio.timeout(60):
        async for piece in server.generate(asked, GREEDY):
            last = piece
    assert last.finish_reason == "length"
    return asked


async def answer(server, asked, kill_after=None):
    """Return the tokens of an answer; kill processes after some of them."""
    tokens = []
    async with asyncio.timeout(60):
        async for piece in server.generate(asked, GREEDY):
            tokens += piece.token_ids
            if kill_after and len(tokens) >= kill_after[0]:
                for core in kill_after[1]:
                    os.kill(core.pid, signal.SIGKILL)
                kill_after = None
    assert kill_after is None
    return tokens


async def told(server, asked, worker, tokens, seconds=10.0):
    """Wait until the index knows of *tokens* on *worker* by events alone."""
    exact = server.cluster.index.exact
    async with asyncio.timeout(seconds):
        while exact.match(asked, (worker,), server.clock() + 99)[0, 0] < tokens:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def diagnosis(server, tokens, worker):
    asked = request("why", tokens)
    return " | ".join(server.cluster.index.diagnose(asked, worker, server.clock()))


async def test_the_index_names_each_cause_and_no_request_fails(model):
    cluster = llmd.Cluster(To(), index=llmd.BlendedIndex())
    async with Server(cluster) as server:
        await server.add(engine(model, 32), "small")
        await server.add(engine(model, 64), "large")
        shared = prompt(256, salt=3)

        # Block sizes differ: both hold the same prompt, each by its own blocks.
        for worker in ("small", "large"):
            asked = await ask(server, worker, [*shared, 7], f"first-{worker}")
            await told(server, asked, worker, 256)
        held = cluster.index.match(request("both", shared), ("small", "large"), 1e9)
        assert held[:, 0].tolist() == [256, 256]
        assert "under one block of 64" in diagnosis(server, prompt(40), "large")
        assert "block size differs" not in diagnosis(server, shared, "large")

        # The event socket is cut for 5 s: the engine computes and nobody hears.
        stream = server.engine("small")._stream
        cut_at = server.clock()
        stream._events.disconnect(stream._endpoint.events)
        silent = prompt(320, salt=9)
        asked = await ask(server, "small", silent, "silent")
        await asyncio.sleep(1.5)
        said = diagnosis(server, silent, "small")
        assert "told of no block since" in said
        assert cluster.index.follows("small", server.clock()) == "guessed"
        held = cluster.index.match(request("q", silent), ("small",), server.clock())
        assert held[0, 0] == 320  # the guess serves meanwhile
        assert cluster.index.follows("large", server.clock()) == "exact"

        # It is back: the next batch shows the gap, which the engine replays.
        await asyncio.sleep(max(cut_at + 5.0 - server.clock(), 0.0))
        assert await ask(server, "small", prompt(64, salt=10), "still cut")
        stream._events.connect(stream._endpoint.events)
        await asyncio.sleep(0.5)  # what is sent before ZMQ subscribed is missed too
        after = await ask(server, "small", prompt(96, salt=11), "after")
        await told(server, after, "small", 96)
        await told(server, asked, "small", 320)
        assert not stream.decoder.counts["lost batches"]
        assert "holds all 10 full blocks" in diagnosis(server, silent, "small")

        # An engine restarts: a new worker, of which nothing is known yet.
        await server.remove("small")
        await server.add(engine(model, 32), "small-2")
        assert "not known here" in diagnosis(server, shared, "small")
        assert "no KV event of it was ever heard" in diagnosis(
            server, shared, "small-2"
        )
        asked = await ask(server, "small-2", [*shared, 9], "again")
        await told(server, asked, "small-2", 256)
        assert "holds all 8 full blocks" in diagnosis(server, shared, "small-2")

        # It is killed in the middle of an answer, which another one goes on with.
        long = {"prompt": prompt(96, salt=12), "max_new_tokens": 60}
        cluster.router.worker = "large"
        undisturbed = await answer(server, llmd.Request(id="whole", **long))
        cluster.router.worker = "small-2"
        asked = llmd.Request(id="cut", resumable=True, **long)
        said = answer(server, asked, kill_after=(10, server.engine("small-2")._cores))
        assert await said == undisturbed
        assert "small-2" not in server.engines
