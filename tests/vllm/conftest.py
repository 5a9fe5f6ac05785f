"""Real engines on a tiny model, few of them, each shared by a module."""

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import AsyncIterator

import pytest

vllm = pytest.importorskip("vllm")

from llmd.adapters.vllm.engine import VllmEngine  # noqa: E402
from llmd.adapters.vllm.tiny import make_model  # noqa: E402
from llmd.live.engine import Call, Output  # noqa: E402
from llmd.types import Request, WorkerId  # noqa: E402

BLOCK_TOKENS = 32
OPTIONS = {
    "max_model_len": 1024,
    "block_size": BLOCK_TOKENS,
    "kv_cache_memory_bytes": 16 << 20,
}
GREEDY = {"temperature": 0.0, "ignore_eos": True}
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.vllm)
            # vLLM and torch warn of their own deprecations, and the engine's
            # core, forked from here, would take the filter for errors with it.
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(
                pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning")
            )


class Running:
    """A started engine with all it reported."""

    def __init__(self, engine):
        self.engine = engine
        self.reports = []
        self.states = []
        self.worker = None

    async def start(self, name):
        self.worker = await self.engine.start(
            WorkerId(name), self.reports.append, self.states.append
        )
        return self

    async def answer(self, request, **call) -> list[Output]:
        call.setdefault("sampling", GREEDY)
        async with asyncio.timeout(60):
            stream = self.engine.generate(Call(request=request, **call))
            return [piece async for piece in stream]

    async def at_once(self, asked, sampling) -> list[int]:
        """Ask the engine itself, past the adapter, for the whole answer."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=asked.max_new_tokens, **sampling)
        ids = {"prompt_token_ids": asked.prompt.ids.tolist()}
        async for answer in self.engine._llm.generate(ids, params, f"{asked.id}-once"):
            last = answer
        return list(last.outputs[0].token_ids)

    async def told(self, wanted, seconds=10.0):
        """Wait until *wanted* of the reports is true; return what it gave."""
        async with asyncio.timeout(seconds):
            while not (found := wanted(self.reports)):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return found


@contextlib.asynccontextmanager
async def running(engine, name) -> AsyncIterator[Running]:
    try:
        yield await Running(engine).start(name)
    finally:
        await engine.stop()


def prompt(length, salt=0):
    """Make token ids that every other *salt* shares no block with."""
    return [
        (salt * 97 + k * 13 + (k * k) % 7 + salt * k) % 400 + 4 for k in range(length)
    ]


def request(name, tokens, **fields):
    fields.setdefault("max_new_tokens", 8)
    return Request(id=name, prompt=tokens, **fields)


def tokens_of(pieces):
    return [token for piece in pieces for token in piece.token_ids]


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def free_port():
    """Return a port below those that systems hand out: a server takes it later."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [make_model(root / f"tiny{seed}", seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
async def one(models):
    engine = VllmEngine(models[0], names=["tiny"], options=OPTIONS)
    async with running(engine, "one") as started:
        yield started
