"""Layers that go while later ones compute, to an engine that asked beforehand."""

import asyncio
import contextlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("nixl")
pytest.importorskip("xxhash")

sys.path.insert(0, str(Path(__file__).parent))

import pd

from llmd.adapters.vllm.tiny import make_model
from llmd.live import Call
from llmd.transport import TransferId


class Pair:
    """A prefill and a decode engine, and the address of the first."""

    async def start(self, model):
        self.prefill = self.engine(model, "kv_producer")
        self.decode = self.engine(model, "kv_consumer")
        for engine in (self.prefill, self.decode):
            await engine.start("e", lambda report: None, lambda state: None)
        handed = await self.prefilled(pd.asked("first", 0), None)
        self.addresses = handed["llmd_addresses"]
        await self.decoding(pd.asked("fetched", 0), handed)
        return self

    def engine(self, model, role):
        made = pd.engine(model, role, layerwise=True, timeout_s=10.0)
        made._options["max_num_batched_tokens"] = 256  # prompts come in chunks
        return made

    async def stop(self):
        await self.prefill.stop()
        await self.decode.stop()

    async def prefilled(self, request, params):
        call = Call(
            request=request, sampling=pd.GREEDY, kv_transfer=params, prefill_only=True
        )
        handed = None
        async with contextlib.aclosing(self.prefill.generate(call)) as pieces:
            async for piece in pieces:
                handed = piece.kv_transfer or handed
        return handed

    def decoding(self, request, params=None):
        call = Call(request=request, sampling=pd.GREEDY, kv_transfer=params)
        return asyncio.create_task(pd.rest(self.decode.generate(call)))

    def hits(self):
        return self.decode.counters["external_prefix_cache_hits"]

    async def counts(self, engine):
        (counts,) = await engine.transfer_counts()
        return counts


@pytest.fixture(scope="module")
async def pair(tmp_path_factory):
    model = make_model(tmp_path_factory.mktemp("models") / "tiny", tokenizer=False)
    pair = Pair()
    try:
        yield await pair.start(model)
    finally:
        await pair.stop()


def early(pair, name):
    """Return what both engines are told, before either begins."""
    from llmd.adapters.vllm.connector_plan import to_params, to_reserve

    id = TransferId.fresh(name)
    return to_reserve(id), to_params(id, pair.addresses)


@pytest.mark.parametrize("at_once", [1, 4])
async def test_who_asks_before_the_prompt_is_computed_decodes_the_same(pair, at_once):
    async def both(i):
        tokens = (20, 33, 64, 256, 257, 700, 1500, 900)[i % 8]
        name = f"e{at_once}-{i}"
        reserve, params = early(pair, name)
        decoding = pair.decoding(pd.asked(f"d{name}", i, tokens), params)
        await asyncio.sleep(0.02)
        assert not decoding.done()
        handed = await pair.prefilled(pd.asked(f"p{name}", i, tokens), reserve)
        assert handed["llmd_generation"] == reserve["llmd_generation"]
        got = await decoding
        assert got == await pair.decoding(pd.asked(f"w{name}", i, tokens)), tokens
        return tokens - 1

    before, moved = pair.hits(), 0
    for group in range(0, 8, at_once):
        seeds = [100 * at_once + group + i for i in range(at_once)]
        moved += sum(await asyncio.gather(*(both(seed) for seed in seeds)))
    assert pair.hits() - before == moved
    for engine in (pair.prefill, pair.decode):
        counts = await pair.counts(engine)
        assert not counts["offers"] + counts["fetches"] + counts["quarantined_blocks"]
        assert counts["free_slots"] == counts["staging_slots"]


async def test_a_prefill_that_is_given_up_frees_who_asked_early(pair):
    reserve, params = early(pair, "gone")
    decoding = pair.decoding(pd.asked("dgone", 900, 1500), params)
    await asyncio.sleep(0.05)
    prefilling = asyncio.create_task(
        pair.prefilled(pd.asked("pgone", 900, 1500), reserve)
    )
    await asyncio.sleep(0.02)
    prefilling.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await prefilling
    async with asyncio.timeout(5):  # not the 10 s of the fetch
        got = await decoding
    assert got == await pair.decoding(pd.asked("wgone", 900, 1500))


async def test_a_name_used_twice_leaks_no_slot(pair):
    reserve, _ = early(pair, "twice")
    for i in range(2):
        assert await pair.prefilled(pd.asked(f"twice{i}", 910, 300), reserve)
    async with asyncio.timeout(4 * pd.OFFER_S):
        while True:
            counts = await pair.counts(pair.prefill)
            if not counts["offers"] and counts["free_slots"] == counts["staging_slots"]:
                break
            await asyncio.sleep(0.1)
