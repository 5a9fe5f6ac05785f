"""What a client gets wrong is a 400 that says so, and costs the engines nothing."""

import asyncio
import json
import logging

import pytest

import llmd

GOOD = {"model": "m", "prompt": "abc", "max_tokens": 3}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hey"}]}


async def refused(http, path, body, status=400):
    # Not `json=`, which cannot write a lone surrogate.
    answer = await http.post(f"/v1/{path}", content=json.dumps(body))
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert len(error["message"]) < 1200
    return error["message"]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "\ud800"},
        {"prompt": ["fine", "\udfff"]},
        {"cache_salt": "\ud800"},
        {"model": "\ud800"},
        {"user": "a\udc00"},
        {"stop": ["\ud800"]},
        {"bad_words": "\ud800"},
        {"whatever": {"\ud800": 1}},
    ],
)
async def test_text_that_is_not_unicode(echo, open_edge, change):
    engine = echo("m")
    async with open_edge(engine) as http:
        says = await refused(http, "completions", {**GOOD, **change})
        assert "Unicode" in says
        assert not engine.tokenized
        assert (await http.get("/metrics")).status_code == 200


async def test_pairs_of_surrogates_are_text(echo, open_edge):
    async with open_edge(echo("m")) as http:
        content = b'{"model": "m", "prompt": "abc", "user": "\\ud83d\\ude00"}'
        answer = await http.post("/v1/completions", content=content)
        assert answer.status_code == 200


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": 5},
        {"role": "user", "content": True},
        {"role": "user", "content": {"type": "text", "text": "a"}},
        {"role": "user", "content": [5]},
        {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
        {"role": "user", "content": [{"type": "text", "text": 5}]},
        {"role": 5, "content": "a"},
        {"content": "a"},
    ],
)
async def test_messages_that_make_no_sense(echo, open_edge, message):
    engine = echo("m")
    async with open_edge(engine) as http:
        says = await refused(http, "chat/completions", {**CHAT, "messages": [message]})
        assert "message" in says
        assert not engine.tokenized


@pytest.mark.parametrize(
    "given",
    [
        "abc",
        [1],
        5,
        {"chat_template": "{% for i in range(10**9) %}{% endfor %}"},
        {"chat_template": None},
        {"tokenize": False},
        {"padding": "max_length", "max_length": 10**12},
        {"tools": []},
    ],
)
async def test_template_variables_only(echo, open_edge, given):
    engine = echo("m")
    async with open_edge(engine) as http:
        body = {**CHAT, "chat_template_kwargs": given}
        says = await refused(http, "chat/completions", body)
        assert "chat_template_kwargs" in says
        assert not engine.tokenized
        body["chat_template_kwargs"] = {"enable_thinking": False}
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
        assert engine.tokenized[0][2] == {"enable_thinking": False}


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    "given",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"response_format": "text"},
        {"structured_outputs": {"choice": ["a"]}},
        {"guided_json": {}},
        {"guided_regex": "a*"},
        {"guided_anything_else": 1},
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "auto"},
        {"tools": "abc", "tool_choice": "none"},
        {"tool_choice": "required"},
        {"functions": [{"name": "f"}]},
        {"chat_template": "x"},
        {"continue_final_message": True},
        {"add_generation_prompt": False},
        {"use_beam_search": True},
        {"truncate_prompt_tokens": 5},
        {"prompt_logprobs": 1},
        {"modalities": ["text", "audio"]},
    ],
)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_nothing_that_changes_the_answer_is_ignored(echo, open_edge, given, path):
    async with open_edge(echo("m")) as http:
        says = await refused(http, path, {**GOOD, **CHAT, **given})
        assert "not supported" in says
        assert any(name in says for name in given)


@pytest.mark.parametrize(
    "given",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None, "guided_json": None, "structured_outputs": None},
        {"tools": []},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tool_choice": "none"},
        {"add_generation_prompt": True, "continue_final_message": False},
        {"modalities": ["text"]},
        {"metadata": {"a": 1}, "store": False},
    ],
)
async def test_what_changes_nothing_is_taken(echo, open_edge, given):
    async with open_edge(echo("m")) as http:
        answer = await http.post("/v1/chat/completions", json={**CHAT, **given})
        assert answer.status_code == 200


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_the_clients_own_field_is_named(echo, open_edge, name):
    async with open_edge(echo("m")) as http:
        says = await refused(http, "chat/completions", {**CHAT, name: 0})
        assert says == f"{name} is 0, must be at least 1"


@pytest.mark.parametrize("prompt", ["abc", [1, 2]])
async def test_an_unknown_model_names_the_known_ones(echo, open_edge, prompt):
    engine = echo("m", loras=("poet",))
    async with open_edge(engine) as http:
        body = {**GOOD, "model": "other", "prompt": prompt}
        says = await refused(http, "completions", body, 404)
        assert "'other'" in says
        assert "m, poet" in says
        says = await refused(http, "chat/completions", {**CHAT, "model": "o"}, 404)
        assert "m, poet" in says
        # Gone for good: its tokenizer is remembered, its name is not.
        assert (await http.post("/v1/completions", json=GOOD)).status_code == 200
        await http.server.remove(*http.server.engines)
        http.server.remove_model("m")
        assert "known: none" in await refused(http, "completions", GOOD, 404)


async def test_a_model_removed_while_its_request_waits(echo, open_edge):
    async with open_edge(echo("m"), echo("k")) as http:
        (worker,) = (
            w.id for w in http.server.cluster.view.workers.facts if "k" in w.models
        )
        await http.server.remove(worker)
        body = {**GOOD, "model": "k", "prompt": [97]}
        waiting = asyncio.create_task(refused(http, "completions", body, 404))
        await asyncio.sleep(0.02)
        http.server.remove_model("k")
        assert await waiting == "model 'k' was removed; known: m"


async def test_an_adapter_is_asked_for_by_its_name(echo, open_edge):
    async with open_edge(echo("m", loras=("poet",))) as http:
        for prompt in ("abc", [97, 98, 99]):
            body = {**GOOD, "model": "poet", "prompt": prompt}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == "poet"
        answer = await http.post("/v1/chat/completions", json={**CHAT, "model": "poet"})
        assert answer.status_code == 200, answer.text
        text = (await http.get("/metrics")).text
        assert 'request_total{model_name="poet",outcome="ok"} 3.0' in text


class TalkativeRouter(llmd.Router):
    """Fails, and has much to say about itself."""

    def __repr__(self):
        return "TalkativeRouter(secrets)"

    def cost(self, request, view):
        raise RuntimeError("more secrets")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failing_policy_tells_the_log_and_not_the_client(
    echo, open_edge, caplog, stream
):
    cluster = llmd.Cluster(router=TalkativeRouter())
    async with open_edge(echo("m"), cluster=cluster) as http:
        with caplog.at_level(logging.ERROR, "llmd.http"):
            body = {**GOOD, "stream": stream}
            says = await refused(http, "completions", body, 500)
        assert says == "the policy TalkativeRouter raised RuntimeError"
        assert "more secrets" in caplog.text


class NanRouter(TalkativeRouter):
    def cost(self, request, view):
        return [float("nan")] * len(view.workers)


async def test_a_broken_contract_is_short_too(echo, open_edge):
    async with open_edge(echo("m"), cluster=llmd.Cluster(router=NanRouter())) as http:
        says = await refused(http, "completions", GOOD, 500)
        assert says == "the policy NanRouter broke its contract"
