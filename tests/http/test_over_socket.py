"""The edge on a real port: overload, paths that are not there, labels."""

import asyncio

import httpx

import llmd
from llmd import balancer
from llmd.adapters.openai_http import create_app
from llmd.live import Server

GOOD = {"model": "m", "prompt": "abc", "max_tokens": 3}


async def test_a_bound_on_the_queue_is_429(echo, over_socket):
    cluster = llmd.Cluster(
        balancer=balancer.FlowControl(
            balancer.Fcfs(max_running=1), gates=[balancer.QueueFull(requests=1)]
        )
    )
    async with Server(cluster) as server:
        await server.add(echo("m", pace=0.1))
        async with (
            over_socket(create_app(server)) as url,
            httpx.AsyncClient(base_url=url, timeout=10) as http,
        ):
            for stream in (False, True):
                body = {**GOOD, "stream": stream}
                calls = [http.post("/v1/completions", json=body) for _ in range(4)]
                answers = await asyncio.gather(*calls)
                statuses = sorted(answer.status_code for answer in answers)
                assert statuses == [200, 200, 429, 429]
                for refused in (a for a in answers if a.status_code == 429):
                    assert int(refused.headers["retry-after"]) >= 1
                    error = refused.json()["error"]
                    assert error["type"] == "rate_limit_error"
                    assert error["code"] == "Rejected"
                    assert "queue full" in error["message"]


async def test_a_rate_limit_says_when(echo, over_socket):
    gate = balancer.RateLimit(requests_per_min=6.0, burst_s=10.0)
    cluster = llmd.Cluster(balancer=balancer.FlowControl(balancer.Fcfs(), gates=[gate]))
    async with Server(cluster) as server:
        await server.add(echo("m"))
        async with (
            over_socket(create_app(server)) as url,
            httpx.AsyncClient(base_url=url, timeout=10) as http,
        ):
            assert (await http.post("/v1/completions", json=GOOD)).status_code == 200
            refused = await http.post("/v1/completions", json=GOOD)
            assert refused.status_code == 429
            assert 5 <= int(refused.headers["retry-after"]) <= 10


async def test_models_one_by_one_and_what_is_not_there(echo, over_socket):
    async with Server(llmd.Cluster()) as server:
        await server.add(echo("org/m", loras=("poet",)))
        async with (
            over_socket(create_app(server)) as url,
            httpx.AsyncClient(base_url=url) as http,
        ):
            for name in ("org/m", "poet"):
                card = await http.get(f"/v1/models/{name}")
                assert card.status_code == 200
                assert card.json()["id"] == name
                assert card.json()["object"] == "model"
            for method, path, status in (
                ("GET", "/v1/models/other", 404),
                ("GET", "/v1/models/%ED%A0%80", 404),
                ("GET", "/v2", 404),
                ("POST", "/v1/embeddings", 404),
                ("GET", "/v1/completions", 405),
                ("DELETE", "/v1/models/poet", 405),
            ):
                answer = await http.request(method, path)
                assert answer.status_code == status
                error = answer.json()["error"]
                assert error["type"] == "invalid_request_error"
                assert error["message"]
            assert "POST" in (await http.get("/v1/completions")).headers["allow"]
            assert "org/m, poet" in (await http.get("/v1/models/x")).text


async def test_names_nobody_knows_share_a_label(echo, open_edge):
    async with open_edge(echo("m"), echo()) as http:
        lines = []
        for round in range(2):
            for number in range(20):
                body = {**GOOD, "model": f"junk-{round}-{number}"}
                for prompt in ("abc", [97, 98]):
                    await http.post("/v1/completions", json={**body, "prompt": prompt})
            text = (await http.get("/metrics")).text
            assert "junk" not in text
            lines.append(len(text.splitlines()))
        assert lines[0] == lines[1]
        assert 'model_name="unknown"' in text
        assert len(http.server.engines) == 2


async def test_one_label_for_what_is_refused(echo, open_edge):
    async with open_edge(echo("m")) as http:
        for number in range(20):
            body = {**GOOD, "model": f"junk{number}", "prompt": [97]}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 404
        assert "junk" not in (await http.get("/metrics")).text
