"""The official client against a server that speaks the scale endpoint."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import llmd
from llmd.autoscaler import TargetConcurrency
from llmd.commands import Scale
from llmd.errors import EngineError, InvalidPolicy
from llmd.live import Server

pytest.importorskip("kubernetes")
from kubernetes import client as k8s

from llmd.adapters.kubernetes import KubernetesScaler, Target

DEPLOYMENT = "/apis/apps/v1/namespaces/llm/deployments/vllm/scale"
SET = "/apis/leaderworkerset.x-k8s.io/v1/namespaces/default/leaderworkersets/big/scale"


class ScaleServer(ThreadingHTTPServer):
    """Holds scales by path, as the API server shows them."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.scales = {DEPLOYMENT: 1, SET: 1}
        self.patches, self.refusals = [], []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer()

    def do_PATCH(self):
        size = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(size))
        kind = self.headers["Content-Type"]
        self.server.patches.append((self.path, kind, body))
        if self.server.refusals:
            return self.say(self.server.refusals.pop(0), {"message": "no"})
        if self.path in self.server.scales:
            # A merge patch is an object, a JSON patch would be a list.
            if kind == "application/json-patch+json" and not isinstance(body, list):
                return self.say(400, {"message": "cannot unmarshal object"})
            self.server.scales[self.path] = body["spec"]["replicas"]
        return self.answer()

    def answer(self):
        if self.path not in self.server.scales:
            return self.say(404, {"kind": "Status", "reason": "NotFound"})
        count = self.server.scales[self.path]
        scale = {
            "apiVersion": "autoscaling/v1",
            "kind": "Scale",
            "metadata": {"name": self.path.split("/")[-2]},
            "spec": {"replicas": count},
            "status": {"replicas": count, "selector": "app=vllm"},
        }
        return self.say(200, scale)

    def say(self, status, body):
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def api_server():
    with ScaleServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(5.0)


@pytest.fixture
def make_scaler(api_server):
    def make(targets=None, **settings):
        host = f"http://127.0.0.1:{api_server.server_port}"
        api = k8s.ApiClient(k8s.Configuration(host=host))
        targets = targets or {"": Target(name="vllm", namespace="llm")}
        return KubernetesScaler(targets, api=api, **settings)

    return make


def test_a_deployment_is_scaled(make_scaler, api_server):
    scaler = make_scaler()
    assert scaler.replicas() == 1
    assert scaler.set_replicas(3) == 3
    assert api_server.scales[DEPLOYMENT] == 3
    [(path, kind, body)] = api_server.patches
    assert (path, body) == (DEPLOYMENT, {"spec": {"replicas": 3}})
    assert kind == "application/merge-patch+json"


def test_a_leader_worker_set_is_scaled(make_scaler, api_server):
    scaler = make_scaler({"": Target(name="big", kind="LeaderWorkerSet")})
    assert scaler.set_replicas(0) == 0
    assert api_server.scales[SET] == 0


def test_another_kind_says_where_it_is():
    with pytest.raises(InvalidPolicy):
        Target(name="x", kind="RoleBasedGroup")
    target = Target(name="x", kind="RoleBasedGroup", group="w.io", plural="rbgs")
    assert target.path == ("w.io", "v1", "rbgs")


def test_refusals_say_what_was_refused(make_scaler, api_server):
    with pytest.raises(EngineError, match=r"404 .*Not Found|404"):
        make_scaler({"": Target(name="gone")}).set_replicas(1)
    api_server.refusals.append(403)
    with pytest.raises(EngineError, match="patch scale of Deployment llm/vllm: 403"):
        make_scaler().set_replicas(2)


def test_nobody_answering_is_an_error_too():
    configuration = k8s.Configuration(host="http://127.0.0.1:9")
    configuration.retries = False
    api = k8s.ApiClient(configuration)
    scaler = KubernetesScaler({"": Target(name="vllm")}, api=api, timeout=2.0)
    with pytest.raises(EngineError):
        scaler.set_replicas(1)


async def until(true, seconds=10.0):
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_cluster_scales_a_deployment(make_scaler, api_server):
    scaler = make_scaler()
    policy = TargetConcurrency(requests_per_worker=2, max_workers=4)
    cluster = llmd.Cluster(autoscaler=policy, balancer=llmd.Fcfs(max_running=0))
    async with Server(cluster, tick=0.02, scale=scaler.obey) as server, scaler:
        tickets = [server.enter(llmd.Request(id=f"r{n}", prompt=[1])) for n in range(7)]
        await until(lambda: api_server.scales[DEPLOYMENT] == 4)
        for ticket in tickets:
            server.leave(ticket)


async def test_a_failed_patch_is_sent_again_with_the_newest_count(
    make_scaler, api_server
):
    api_server.refusals += [500, 409]
    async with make_scaler(pause=0.05) as scaler:
        scaler.obey(Scale(2))
        await until(lambda: scaler.failures == 1)
        scaler.obey(Scale(3))
        scaler.obey(Scale(9, "nobody"))
        await until(lambda: api_server.scales[DEPLOYMENT] == 3)
    assert scaler.failures == 2
    assert [body["spec"]["replicas"] for *_, body in api_server.patches][-1] == 3


async def test_a_restart_makes_nothing_smaller_at_once(make_scaler, api_server):
    """Its workers have not joined yet, so that the first count is too small."""
    api_server.scales[DEPLOYMENT] = 5
    scaler = make_scaler(settle=0.4, pause=0.05)
    async with scaler:
        scaler.obey(Scale(1))
        await asyncio.sleep(0.2)
        assert api_server.scales[DEPLOYMENT] == 5
        scaler.obey(Scale(7))
        async with asyncio.timeout(5.0):
            while api_server.scales[DEPLOYMENT] != 7:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            scaler.obey(Scale(2))
            while api_server.scales[DEPLOYMENT] != 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
