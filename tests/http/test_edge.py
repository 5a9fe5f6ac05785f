"""OpenAI's endpoints: what they answer, and what they refuse."""

import asyncio
import json

import pytest

import llmd


def idle(http):
    workers = http.server.cluster.view.workers
    return not workers.running_requests.any() and not http.server._tickets


def events(text):
    lines = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_a_completion(echo, open_edge):
    async with open_edge(echo("m")) as http:
        body = {"model": "m", "prompt": "abc", "max_tokens": 3}
        answer = (await http.post("/v1/completions", json=body)).json()
        assert answer["object"] == "text_completion"
        assert answer["choices"][0]["text"] == "abc"
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"] == {
            "prompt_tokens": 3,
            "completion_tokens": 3,
            "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 2},
        }
        assert idle(http)


async def test_token_ids_and_several_prompts(echo, open_edge):
    async with open_edge(echo("m")) as http:
        body = {"model": "m", "prompt": [[97, 98], [99]], "max_tokens": 2, "n": 2}
        answer = (await http.post("/v1/completions", json=body)).json()
        texts = [choice["text"] for choice in answer["choices"]]
        assert texts == ["ab", "ab", "cc", "cc"]
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
        assert answer["usage"]["prompt_tokens"] == 3
        assert answer["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("choices", [1, 3])
async def test_a_stream(echo, open_edge, choices):
    async with open_edge(echo("m")) as http:
        body = {
            "model": "m",
            "prompt": "abc",
            "max_tokens": 3,
            "n": choices,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        pieces = events((await http.post("/v1/completions", json=body)).text)
        *pieces, usage = pieces
        for index in range(choices):
            own = [c for p in pieces for c in p["choices"] if c["index"] == index]
            assert "".join(choice["text"] for choice in own) == "abc"
            assert [c["finish_reason"] for c in own] == [None, None, "length"]
        assert len({piece["id"] for piece in pieces}) == 1
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 3 * choices
        assert idle(http)


async def test_chat(echo, open_edge):
    async with open_edge(echo("m")) as http:
        body = {"model": "m", "messages": [{"role": "user", "content": "hey"}]}
        answer = (await http.post("/v1/chat/completions", json=body)).json()
        assert answer["object"] == "chat.completion"
        message = answer["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "hey"}
        streamed = await http.post(
            "/v1/chat/completions", json={**body, "stream": True}
        )
        pieces = events(streamed.text)
        assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
        assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
        contents = [piece["choices"][0]["delta"]["content"] for piece in pieces]
        assert "".join(contents) == "hey"


GOOD = {"model": "m", "prompt": "abc", "max_tokens": 3}


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"model": "other"}, 404, "other"),
        ({"prompt": ""}, 400, "at least one token"),
        ({"prompt": []}, 400, "prompt must be"),
        ({"prompt": None}, 400, "prompt must be"),
        ({"prompt": [1, "a"]}, 400, "prompt must be"),
        ({"prompt": [-1]}, 400, "prompt must be"),
        ({"prompt": [1 << 40]}, 400, "prompt must be"),
        ({"prompt": [[1]] * 129}, 400, "at most"),
        ({"max_tokens": -1}, 400, "at least 1"),
        ({"max_tokens": 0}, 400, "at least 1"),
        ({"max_tokens": 10**30}, 400, "whole number"),
        ({"max_tokens": 10**9}, 400, "takes 1000"),
        ({"max_tokens": "many"}, 400, "whole number"),
        ({"max_tokens": 1.5}, 400, "whole number"),
        ({"prompt": "a" * 1001}, 400, "takes 1000"),
        ({"temperature": -1}, 400, "negative"),
        ({"n": 0}, 400, "n is"),
        ({"n": 10**6}, 400, "n is"),
        ({"stream": "yes"}, 400, "true or false"),
        ({"stream_options": 3}, 400, "not an object"),
        ({"echo": True}, 400, "not supported"),
        ({"model": 3}, 400, "must be text"),
        ({"priority": "high"}, 400, "whole number"),
        ({"sheddable": "yes"}, 400, "true or false"),
        ({"resumable": 1}, 400, "true or false"),
        ({"cache_salt": 3}, 400, "must be text"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_bodies(echo, open_edge, change, status, says, stream):
    async with open_edge(echo("m")) as http:
        body = {**GOOD, "stream": stream, **change}
        answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == status
        assert says in answer.json()["error"]["message"]
        assert idle(http)
        assert (await http.post("/v1/completions", json=GOOD)).status_code == 200


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"[1]", 400),
        (b"null", 400),
        (b'{"model": "m"', 400),
        (b'{"model": "\xff\xfe"}', 400),
        (b'{"model": "m", "prompt": "a", "temperature": NaN}', 400),
        (b"[" * 100_000, 400),
        (b'{"prompt": "' + b"a" * 5000 + b'"}', 413),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_bad_bytes(echo, open_edge, content, status, path):
    limit = 4000 if status == 413 else 1 << 20
    async with open_edge(echo("m"), max_body_bytes=limit) as http:
        answer = await http.post(path, content=content)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
        assert idle(http)


@pytest.mark.parametrize("messages", [None, [], "hi", [1], {}])
async def test_bad_messages(echo, open_edge, messages):
    async with open_edge(echo("m")) as http:
        body = {"model": "m", "messages": messages}
        answer = await http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert "message" in answer.json()["error"]["message"]


async def test_a_full_queue_is_429_with_a_time_to_retry(echo, open_edge):
    cluster = llmd.Cluster(balancer=llmd.Fcfs(max_running=1, max_waiting=1))
    async with open_edge(echo("m", pace=0.02), cluster=cluster) as http:
        calls = [http.post("/v1/completions", json=GOOD) for _ in range(3)]
        answers = await asyncio.gather(*calls)
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429]
        (refused,) = [a for a in answers if a.status_code == 429]
        assert refused.headers["retry-after"] == "1"
        assert idle(http)


async def test_a_deadline_is_504(echo, open_edge):
    async with open_edge(echo("m", pace=0.05)) as http:
        headers = {"x-request-timeout": "0.03"}
        answer = await http.post("/v1/completions", json=GOOD, headers=headers)
        assert answer.status_code == 504
        bad = await http.post(
            "/v1/completions", json=GOOD, headers={"x-request-timeout": "soon"}
        )
        assert bad.status_code == 400
        assert idle(http)


async def test_no_worker_left_is_503_or_waits(echo, open_edge):
    async with open_edge(echo("m")) as http:
        await http.post("/v1/completions", json=GOOD)
        (worker,) = http.server.engines
        await http.server.remove(worker)
        assert (await http.get("/health")).status_code == 503
        waiting = asyncio.create_task(http.post("/v1/completions", json=GOOD))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        await http.server.add(echo("m"))
        assert (await waiting).status_code == 200


async def test_a_worker_lost_in_mid_stream_ends_the_stream_with_an_error(
    echo, open_edge
):
    async with open_edge(echo("m", dies_after=2)) as http:
        answer = await http.post("/v1/completions", json={**GOOD, "stream": True})
        assert answer.status_code == 200
        assert "[DONE]" not in answer.text
        last = json.loads(answer.text.strip().split("\n")[-1][6:])
        assert last["error"]["code"] == "WorkerLost"
        assert idle(http)


async def test_models_health_and_metrics(echo, open_edge):
    async with open_edge(echo("m"), echo("k")) as http:
        models = (await http.get("/v1/models")).json()
        assert [model["id"] for model in models["data"]] == ["k", "m"]
        assert (await http.get("/health")).json() == {"ready_workers": 2}
        await http.post("/v1/completions", json=GOOD)
        await http.post("/v1/completions", json={**GOOD, "temperature": -1})
        text = (await http.get("/metrics")).text
        for line in (
            'inference_pool_ready_pods{name="llmd"} 2.0',
            'inference_pool_average_queue_size{name="llmd"} 0.0',
            'inference_objective_running_requests{model_name="m"} 0.0',
            'inference_objective_request_total{model_name="m",outcome="ok"} 1.0',
            'llmd_tokens_total{kind="generated",model_name="m"} 3.0',
            'llmd_tokens_total{kind="cached",model_name="m"} 2.0',
            'llmd_time_to_first_token_seconds_count{model_name="m"} 1.0',
        ):
            assert line in text
        assert 'outcome="InvalidRequest"' in text


async def test_a_client_says_what_may_make_place(echo, open_edge):
    engine, asked = echo("m"), []
    generate = engine.generate

    def listening(call):
        asked.append((call.request.sheddable, call.request.resumable))
        return generate(call)

    engine.generate = listening
    async with open_edge(engine) as http:
        for more in ({}, {"sheddable": True}, {"sheddable": True, "resumable": True}):
            answer = await http.post("/v1/completions", json={**GOOD, **more})
            assert answer.status_code == 200
    assert asked == [(False, False), (True, False), (True, True)]
