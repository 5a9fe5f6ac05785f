"""The official client against a server that speaks the scale endpoint."""

import asyncio
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import llmd
from llmd.autoscaler import TargetConcurrency
from llmd.commands import Scale
from llmd.errors import EngineError, InvalidPolicy, UnknownPool
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
        self.slow = threading.Event()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer()

    def do_PATCH(self):
        size = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(size))
        kind = self.headers["Content-Type"]
        self.server.patches.append((self.path, kind, body))
        while self.server.slow.is_set():
            time.sleep(0.01)
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
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
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


@pytest.mark.parametrize("name", ["", None, 5])
def test_a_target_has_a_name(name):
    with pytest.raises(InvalidPolicy, match=r"Target\.name"):
        Target(name=name)


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


@pytest.mark.parametrize("count", ["three", None, [3]])
def test_an_answer_without_a_count_is_an_error(make_scaler, api_server, count):
    api_server.scales[DEPLOYMENT] = count
    with pytest.raises(EngineError, match="has no count"):
        make_scaler().replicas()


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


# What cannot be asked for ---------------------------------------------------


@pytest.mark.parametrize("count", [None, -1, 1.5, True, "3", math.nan])
def test_only_counts_can_be_asked_for(make_scaler, api_server, count):
    scaler = make_scaler()
    with pytest.raises(InvalidPolicy, match="cannot be asked for"):
        scaler.set_replicas(count)
    with pytest.raises(InvalidPolicy, match="cannot be asked for"):
        scaler.obey(Scale(count))
    assert api_server.patches == []


def test_a_pool_without_a_target_is_named(make_scaler):
    for call in (
        make_scaler().replicas,
        lambda pool: make_scaler().set_replicas(1, pool),
    ):
        with pytest.raises(UnknownPool, match="no target for pool 'x'; known: ''"):
            call("x")


@pytest.mark.parametrize("name", ["timeout", "pause", "settle", "look", "grace"])
@pytest.mark.parametrize("seconds", [-1.0, math.nan, None, True])
def test_seconds_are_seconds(make_scaler, name, seconds):
    with pytest.raises(InvalidPolicy, match=name):
        make_scaler(**{name: seconds})


# Leaving --------------------------------------------------------------------


@pytest.mark.parametrize("refusals", [[], [500, 409]])
async def test_what_was_obeyed_last_is_sent_on_leaving(
    make_scaler, api_server, refusals
):
    api_server.refusals += refusals
    async with make_scaler() as scaler:
        scaler.obey(Scale(2))
        scaler.obey(Scale(6))
    assert api_server.scales[DEPLOYMENT] == 6


async def test_a_count_after_one_under_way_comes_last(make_scaler, api_server):
    api_server.slow.set()
    async with make_scaler() as scaler:
        scaler.obey(Scale(2))
        await until(lambda: api_server.patches)
        scaler.obey(Scale(6))
        asyncio.get_running_loop().call_later(0.2, api_server.slow.clear)
    assert api_server.scales[DEPLOYMENT] == 6


async def test_leaving_ends_in_time_and_says_what_was_not_sent(
    make_scaler, api_server, caplog
):
    api_server.refusals += [500] * 1000
    began = asyncio.get_running_loop().time()
    async with make_scaler(grace=0.3) as scaler:
        scaler.obey(Scale(6))
    assert 0.3 <= asyncio.get_running_loop().time() - began < 3.0
    assert "pool '': 6 were not asked for" in caplog.text


async def test_leaving_does_not_wait_for_what_has_to_settle(make_scaler, api_server):
    api_server.scales[DEPLOYMENT] = 5
    began = asyncio.get_running_loop().time()
    async with make_scaler(grace=30.0) as scaler:
        scaler.obey(Scale(1))
    assert asyncio.get_running_loop().time() - began < 10.0
    assert api_server.scales[DEPLOYMENT] == 5


# Others ---------------------------------------------------------------------


@pytest.mark.parametrize("others", [0, 7])
async def test_what_others_change_is_put_back(make_scaler, api_server, caplog, others):
    async with make_scaler(look=0.05, settle=0.0) as scaler:
        scaler.obey(Scale(3))
        await until(lambda: api_server.scales[DEPLOYMENT] == 3)
        await asyncio.sleep(0.2)
        assert scaler.drifts == 0
        api_server.scales[DEPLOYMENT] = others
        await until(lambda: api_server.scales[DEPLOYMENT] == 3)
    assert scaler.drifts == 1
    assert f"pool '': somebody asked for {others}, put back to 3" in caplog.text


async def test_what_others_change_can_be_adopted(make_scaler, api_server, caplog):
    async with make_scaler(look=0.05, settle=0.0, adopt=True) as scaler:
        scaler.obey(Scale(3))
        await until(lambda: api_server.scales[DEPLOYMENT] == 3)
        api_server.scales[DEPLOYMENT] = 7
        await until(lambda: scaler.drifts == 1)
        await asyncio.sleep(0.2)
        assert (scaler.drifts, api_server.scales[DEPLOYMENT]) == (1, 7)
        assert "somebody asked for 7, adopted" in caplog.text
        scaler.obey(Scale(4))
        await until(lambda: api_server.scales[DEPLOYMENT] == 4)


async def test_a_look_that_fails_is_counted_and_repeated(make_scaler, api_server):
    async with make_scaler(look=0.05, settle=0.0) as scaler:
        scaler.obey(Scale(3))
        await until(lambda: api_server.scales[DEPLOYMENT] == 3)
        del api_server.scales[DEPLOYMENT]
        await until(lambda: scaler.failures >= 2)
        api_server.scales[DEPLOYMENT] = 1
        await until(lambda: api_server.scales[DEPLOYMENT] == 3)


async def test_who_never_looks_changes_nothing(make_scaler, api_server):
    async with make_scaler(look=math.inf, settle=0.0) as scaler:
        scaler.obey(Scale(3))
        await until(lambda: api_server.scales[DEPLOYMENT] == 3)
        api_server.scales[DEPLOYMENT] = 7
        await asyncio.sleep(0.3)
    assert api_server.scales[DEPLOYMENT] == 7
