import asyncio

import numpy as np
import pytest
import zmq.asyncio
from tests.vllm.conftest import (
    BLOCK_TOKENS,
    GREEDY,
    prompt,
    request,
    text_of,
    tokens_of,
)

from llmd.adapters.vllm.kv_events import KVEventDecoder
from llmd.adapters.vllm.kv_stream import KVEndpoint, KVEventStream
from llmd.errors import InvalidRequest, PromptTooLong, UnknownAdapter
from llmd.events import BlocksCleared, BlocksStored, SignalsReported
from llmd.live.engine import Call
from llmd.types import State, WorkerId


def stored(reports):
    found = [r.hashes for r in reports if isinstance(r, BlocksStored)]
    return np.concatenate(found) if found else np.empty(0, np.uint64)


async def test_start_says_what_it_can_do(one):
    assert one.states == [State.LOADING, State.WARMING]
    worker = one.worker
    assert worker.id == "one"
    assert worker.state is State.READY
    assert worker.models == {"tiny"}
    assert worker.block_tokens == BLOCK_TOKENS
    assert worker.kv_blocks == (16 << 20) // (2 * 2 * 2 * 32 * 4 * BLOCK_TOKENS) - 1
    assert worker.max_model_tokens == 1024
    assert worker.max_running == 16


async def test_the_probes_leave_no_trace(one):
    probed = await one.answer(request("probe-like", [7] * 512))
    assert probed[0].cached_tokens == 0


async def test_pieces_add_up_to_the_answer(one):
    letters = await one.engine.tokenize("abcdefghijklmnopqrstuvwxyz")
    sampling = {**GREEDY, "allowed_token_ids": letters}
    tokens = await one.engine.tokenize("Once upon a time")
    asked = request("whole", tokens, max_new_tokens=20)
    pieces = await one.answer(asked, sampling=sampling)
    assert len(pieces) > 1
    assert len(tokens_of(pieces)) == 20
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "length"
    assert text_of(pieces) == one.engine.tokenizer.decode(tokens_of(pieces))
    assert tokens_of(pieces) == await one.at_once(asked, sampling=sampling)


async def test_a_repeat_finds_its_whole_blocks(one):
    tokens = prompt(10 * BLOCK_TOKENS + 5, salt=1)
    first = await one.answer(request("cold", tokens))
    second = await one.answer(request("warm", tokens))
    assert first[0].cached_tokens == 0
    assert second[0].cached_tokens == 10 * BLOCK_TOKENS
    assert tokens_of(first) == tokens_of(second)


@pytest.mark.parametrize("salt", ["", "tenant-a", "tenant-b"])
async def test_events_name_blocks_as_requests_do(one, salt):
    tokens = prompt(4 * BLOCK_TOKENS + 3, salt=2)
    asked = request(f"named-{salt}", tokens, salt=salt, max_new_tokens=BLOCK_TOKENS)
    pieces = await one.answer(asked)
    assert pieces[0].cached_tokens == 0, "salts must not share blocks"
    whole = request("whole", tokens + tokens_of(pieces), salt=salt)
    expected = whole.hashes(BLOCK_TOKENS)
    assert len(expected) == 5
    await one.told(lambda reports: np.isin(expected, stored(reports)).all())


async def test_generation_extends_the_prompts_chain(one):
    tokens = prompt(BLOCK_TOKENS - 2, salt=3)
    pieces = await one.answer(request("grow", tokens, max_new_tokens=3 * BLOCK_TOKENS))
    longer = request("longer", tokens + tokens_of(pieces)).hashes(BLOCK_TOKENS)
    # The last token's KV is never computed.
    await one.told(lambda reports: np.isin(longer[:3], stored(reports)).all())


async def test_closing_the_iterator_aborts(one):
    stream = one.engine.generate(
        Call(
            request=request("closed", prompt(20, salt=4), max_new_tokens=900),
            sampling=GREEDY,
        )
    )
    async for _ in stream:
        break
    await stream.aclose()
    await one.told(
        lambda reports: [
            r
            for r in reports[-1:]
            if isinstance(r, SignalsReported) and r.signals.running_requests == 0
        ]
    )


async def test_abort_ends_the_stream(one):
    stream = one.engine.generate(
        Call(
            request=request("aborted", prompt(20, salt=5), max_new_tokens=900),
            sampling=GREEDY,
        )
    )
    pieces = []
    async with asyncio.timeout(30):
        async for piece in stream:
            pieces.append(piece)
            if len(pieces) == 3:
                await one.engine.abort("aborted")
    assert pieces[-1].finish_reason == "abort"
    assert len(tokens_of(pieces)) < 900


async def test_what_an_aborted_prompt_computed_is_found_again(one):
    """As the simulator has it, and as shed work counts on."""
    for attempt in range(40):
        tokens = prompt(1000, salt=500 + attempt)
        asked = request(f"cut short {attempt}", tokens, max_new_tokens=2)
        stream = one.engine.generate(Call(request=asked, sampling=GREEDY))
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.001 * (1 + attempt))
        answered = first.done()
        await one.engine.abort(asked.id)
        async with asyncio.timeout(30):
            await first
            async for _ in stream:
                pass
        again = await one.answer(request(f"again {attempt}", tokens))
        if not answered and again[0].cached_tokens:
            break
    else:
        pytest.fail("no abort met a prompt under way")
    names = request("names", tokens).hashes(BLOCK_TOKENS)
    told = again[0].cached_tokens // BLOCK_TOKENS
    await one.told(lambda reports: np.isin(names[:told], stored(reports)).all())


async def test_signals_tell_of_load_and_its_end(one):
    before = len(one.reports)
    await asyncio.gather(
        *(
            one.answer(request(f"load{k}", prompt(40, salt=20 + k), max_new_tokens=64))
            for k in range(8)
        )
    )

    def settled(reports):
        signals = [r for r in reports[before:] if isinstance(r, SignalsReported)]
        return signals and signals[-1].signals.running_requests == 0 and signals

    told = await one.told(settled)
    assert max(r.signals.running_requests for r in told) == 8
    assert all(0 <= r.signals.kv_usage <= 1 for r in told)
    assert all(r.measured_at <= r.at for r in told)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temprature": 1.0},
        {"temperature": "hot"},
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"n": 2},
        {"max_tokens": 5},
        {"stop": [""]},
        {"stop_token_ids": ["a"]},
        {"logit_bias": {"a": 1.0}},
        {"logit_bias": {"7000": 1.0}},
        {"top_logprobs": 2},
        {"logprobs": -7},
    ],
)
async def test_bad_sampling_is_the_callers_fault(one, sampling):
    with pytest.raises(InvalidRequest):
        await one.answer(request("bad", prompt(8)), sampling=sampling)


async def test_bad_prompts_are_the_callers_fault(one):
    with pytest.raises(PromptTooLong):
        await one.answer(request("long", prompt(1024)))
    with pytest.raises(PromptTooLong):
        await one.answer(request("long", prompt(8), max_new_tokens=1 << 40))
    with pytest.raises(InvalidRequest):
        await one.answer(request("vocabulary", [5, 100_000]))
    with pytest.raises(UnknownAdapter):
        await one.answer(request("adapter", prompt(8), lora="none"))


async def test_sampling_reaches_the_engine(one):
    biased = {"temperature": 0.0, "logit_bias": {"99": 100.0}, "logprobs": 2}
    pieces = await one.answer(request("biased", prompt(8)), sampling=biased)
    assert tokens_of(pieces) == [99] * 8
    assert len(pieces[0].logprobs[0]) == 3  # two best of the model, and the chosen
    seeded = {"temperature": 1.5, "seed": 7, "ignore_eos": True}
    first = await one.answer(request("seed1", prompt(8)), sampling=seeded)
    second = await one.answer(request("seed2", prompt(8)), sampling=seeded)
    third = await one.answer(
        request("seed3", prompt(8)), sampling={**seeded, "seed": 8}
    )
    assert tokens_of(first) == tokens_of(second) != tokens_of(third)


async def test_without_a_cap_it_fills_the_model(one):
    pieces = await one.answer(request("fill", prompt(1000), max_new_tokens=None))
    assert len(tokens_of(pieces)) == 24


async def test_tokenizer_and_chat_template(one):
    assert one.engine.tokenizer.decode(await one.engine.tokenize("héllo")) == "héllo"
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    ids = await one.engine.chat(parts)
    assert ids == await one.engine.tokenize(
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    for bad in ([{"content": "x"}], [{"role": "user", "content": [{"type": "image"}]}]):
        with pytest.raises(InvalidRequest):
            await one.engine.chat(bad)


async def test_pause_freezes_and_resume_goes_on(one):
    straight = await one.answer(request("straight", prompt(9), max_new_tokens=64))
    stream = one.engine.generate(
        Call(request=request("paused", prompt(9), max_new_tokens=64), sampling=GREEDY)
    )
    pieces = [await anext(stream)]

    async def read_on():
        async for piece in stream:
            pieces.append(piece)  # noqa: PERF401

    await one.engine.pause()
    reading = asyncio.create_task(read_on())
    await asyncio.sleep(0.3)
    frozen = len(pieces)
    await asyncio.sleep(0.5)
    assert len(pieces) == frozen < 64
    await one.engine.resume()
    async with asyncio.timeout(30):
        await reading
    assert tokens_of(pieces) == tokens_of(straight)


class Cut:
    """Passes a publisher's batches on, but not those with the numbers given."""

    def __init__(self, source, lost):
        context = zmq.asyncio.Context.instance()
        self.lost = lost
        self.taken, self.given = context.socket(zmq.SUB), context.socket(zmq.PUB)
        self.taken.connect(source)
        self.taken.subscribe(b"")
        self.address = (
            f"tcp://127.0.0.1:{self.given.bind_to_random_port('tcp://127.0.0.1')}"
        )
        self.task = asyncio.create_task(self.run())

    async def run(self):
        while True:
            frames = await self.taken.recv_multipart()
            if int.from_bytes(frames[1], "big") not in self.lost:
                await self.given.send_multipart(frames)

    def close(self):
        self.task.cancel()
        self.taken.close(linger=0)
        self.given.close(linger=0)


@pytest.mark.parametrize("replay", [True, False])
async def test_a_cut_is_closed_by_replay_or_clears(one, replay):
    scratch = one.engine._scratch
    reports = []
    decoder = KVEventDecoder(WorkerId("second"))
    seen = one.engine._stream.decoder._ranks[0].expected
    cut = Cut(f"ipc://{scratch}/events", range(seen + 2, seen + 5))
    stream = KVEventStream(
        decoder,
        reports.append,
        KVEndpoint(cut.address, f"ipc://{scratch}/replay" if replay else ""),
    )
    stream.start()
    try:
        await asyncio.sleep(0.5)  # both subscriptions are there, and the replay done
        start = len(one.reports)
        asked = [
            request(f"cut{replay}{k}", prompt(2 * BLOCK_TOKENS + 1, salt=60 + k))
            for k in range(8 if replay else 16)
        ]
        for each in asked[-8:]:
            await one.answer(each)
        last = asked[-1].hashes(BLOCK_TOKENS)
        async with asyncio.timeout(10):
            while not np.isin(last, stored(reports)).all():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    finally:
        await stream.close()
        cut.close()
    assert len(one.reports) > start
    lost = asked[-8 + 3].hashes(BLOCK_TOKENS)
    cleared = [r for r in reports if isinstance(r, BlocksCleared) and r.reason]
    if replay:
        assert not cleared
        assert np.isin(lost, stored(reports)).all()
    else:
        assert "are lost" in cleared[-1].reason
        assert not np.isin(lost, stored(reports)).any()


async def test_clear_is_told_once_with_the_next_step(one):
    before = len(one.reports)
    assert await one.engine._llm.reset_prefix_cache()
    tokens = prompt(3 * BLOCK_TOKENS, salt=8)
    await one.answer(request("after-clear", tokens))

    def cleared(reports):
        return [r for r in reports[before:] if isinstance(r, BlocksCleared)]

    (report,) = await one.told(cleared)
    assert report.reason == ""
    expected = request("x", tokens).hashes(BLOCK_TOKENS)
    position = one.reports.index(report)
    await one.told(lambda r: np.isin(expected, stored(r[position:])).all())
