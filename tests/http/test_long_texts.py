"""Text that cannot fit is not tokenised, and long text holds up nobody."""

import asyncio
import threading

import pytest

from llmd.adapters.vllm.tokens import Tokenizer

PER_TOKEN = 128


async def test_text_that_cannot_fit_is_not_tokenised(echo, open_edge):
    engine = echo("m", tokens=10)
    async with open_edge(engine, echo("m", tokens=20)) as http:
        fits, over = "a" * (20 * PER_TOKEN), "a" * (20 * PER_TOKEN + 1)
        for prompt, tokenized in ((over, 0), (fits, 1)):
            body = {"model": "m", "prompt": prompt}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "PromptTooLong"
            tried = sum(len(e.tokenized) for e in http.server.engines.values())
            assert tried == tokenized


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": "a" * 700}] * 2},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a" * 1290}]}
            ]
        },
        {"messages": [{"role": "user", "content": "a", "reasoning": "b" * 1290}]},
        {"chat_template_kwargs": {"more": ["a" * 1290]}},
        {"tools": [{"a": "a" * 1290}], "tool_choice": "none"},
    ],
)
async def test_conversations_too(echo, open_edge, change):
    engine = echo("m", tokens=10)
    async with open_edge(engine) as http:
        body = {"model": "m", "messages": [{"role": "user", "content": "a"}], **change}
        answer = await http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "PromptTooLong"
        assert not engine.tokenized


async def test_a_client_that_leaves_while_its_text_is_tokenised(echo, open_edge):
    class Slow(echo):
        async def tokenize(self, text):
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                self.tokenized.append("cancelled")
                raise

    engine = Slow("m")
    async with open_edge(engine) as http:
        headers = {"x-request-timeout": "0.05"}
        body = {"model": "m", "prompt": "abc"}
        answer = await http.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 504
        assert engine.tokenized == ["cancelled"]


class Fake:
    """A tokenizer of Hugging Face: one thread at a time, slow where told to be."""

    def __init__(self, gate):
        self.gate, self.busy = gate, False

    def __deepcopy__(self, memo):
        return Fake(self.gate)

    def encode(self, text):
        assert not self.busy, "Already borrowed"
        self.busy = True
        try:
            if len(text) > 100_000:
                assert self.gate.wait(10)
            return [len(text)]
        finally:
            self.busy = False

    def apply_chat_template(self, messages, **options):
        return self.encode("".join(message["content"] for message in messages))


async def test_long_texts_wait_only_for_each_other():
    gate = threading.Event()
    tokenizer = Tokenizer(Fake(gate))
    talk = [{"role": "user", "content": "x" * 300_000}]
    long = [
        *(asyncio.create_task(tokenizer.encoded("x" * 200_000)) for _ in range(40)),
        asyncio.create_task(tokenizer.prompted(talk)),
    ]
    try:
        async with asyncio.timeout(5):
            await asyncio.sleep(0.02)
            short = [tokenizer.encoded("abc") for _ in range(5)]
            assert await asyncio.gather(*short) == [[3]] * 5
            talk = [{"role": "user", "content": "hi"}]
            assert await tokenizer.prompted(talk) == [2]
            # Nobody else's threads are taken by those who wait.
            assert await asyncio.to_thread(lambda: 1) == 1
            assert not any(task.done() for task in long)
    finally:
        gate.set()
    assert await asyncio.gather(*long) == [[200_000]] * 40 + [[300_000]]


async def test_who_gave_up_waiting_is_not_tokenised():
    gate = threading.Event()
    tokenizer = Tokenizer(Fake(gate))
    first = asyncio.create_task(tokenizer.encoded("x" * 200_000))
    second = asyncio.create_task(tokenizer.encoded("x" * 300_000))
    await asyncio.sleep(0.02)
    second.cancel()
    gate.set()
    assert await first == [200_000]
    assert await tokenizer.encoded("x" * 400_000) == [400_000]


async def test_one_that_cannot_be_copied_is_shared():
    class Alone(Fake):
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle")

    gate = threading.Event()
    gate.set()
    tokenizer = Tokenizer(Alone(gate))
    texts = ["x" * 200_000, "abc"] * 4
    answers = await asyncio.gather(*(tokenizer.encoded(text) for text in texts))
    assert answers == [[len(text)] for text in texts]
