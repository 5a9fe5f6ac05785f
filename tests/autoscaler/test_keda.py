"""A client generated from KEDA's proto talks to the scaler over gRPC."""

import asyncio
import contextlib
import importlib.util
import sys
from pathlib import Path

import pytest

import llmd
from llmd.autoscaler import TargetConcurrency
from llmd.autoscaler.hpa import AverageValue, External, History, HpaSpec, Scene
from llmd.commands import Scale
from llmd.errors import InvalidPolicy
from llmd.live import Server

pytest.importorskip("grpc")
pytest.importorskip("grpc_tools")
import grpc
from grpc_tools import protoc

from llmd.adapters.keda import KedaScaler


@pytest.fixture(scope="session")
def generated(tmp_path_factory):
    """The messages and stub that protoc makes of the published interface."""
    out, source = tmp_path_factory.mktemp("keda"), Path(__file__).parent / "keda"
    flags = [f"-I{source}", f"--python_out={out}", f"--grpc_python_out={out}"]
    assert protoc.main(["protoc", *flags, "externalscaler.proto"]) == 0
    modules = []
    for name in ("externalscaler_pb2", "externalscaler_pb2_grpc"):
        spec = importlib.util.spec_from_file_location(name, out / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        modules.append(module)
    return modules


@pytest.fixture
async def keda(generated):
    messages, services = generated
    scaler = KedaScaler()
    port = await scaler.listen()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield scaler, services.ExternalScalerStub(channel), messages
    await scaler.close()


def target(messages, pool=""):
    metadata = {"scalerAddress": "llmd:6000", "pool": pool}
    return messages.ScaledObjectRef(
        name="vllm", namespace="llm", scalerMetadata=metadata
    )


async def metric(stub, messages, pool="", name="llmd-workers"):
    request = messages.GetMetricsRequest(
        scaledObjectRef=target(messages, pool), metricName=name
    )
    return await stub.GetMetrics(request, timeout=5.0)


async def test_the_metric_is_the_count_of_each_pool(keda):
    scaler, stub, messages = keda
    scaler.obey(Scale(3, "prefill"))
    scaler.obey(Scale(5, "decode"))
    spec = await stub.GetMetricSpec(target(messages), timeout=5.0)
    [named] = spec.metricSpecs
    assert (named.metricName, named.targetSizeFloat) == ("llmd-workers", 1.0)
    for pool, count in (("prefill", 3), ("decode", 5)):
        [value] = (await metric(stub, messages, pool)).metricValues
        assert (value.metricName, value.metricValueFloat) == ("llmd-workers", count)
        assert value.metricValue == count


async def test_zero_is_inactive(keda):
    scaler, stub, messages = keda
    for count, active in ((0, False), (1, True)):
        scaler.obey(Scale(count))
        answer = await stub.IsActive(target(messages), timeout=5.0)
        assert answer.result is active


async def test_a_pool_without_a_count_is_an_error_that_keda_holds_on(keda):
    _, stub, messages = keda
    for call in (
        metric(stub, messages, "nobody"),
        stub.IsActive(target(messages, "nobody"), timeout=5.0),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "nobody" in caught.value.details()


@pytest.mark.parametrize("name", ["", "gpu", "s0-llmd-workers", "x" * 100_000])
async def test_another_metric_is_not_found(keda, name):
    scaler, stub, messages = keda
    scaler.obey(Scale(3))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await metric(stub, messages, name=name)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "'llmd-workers'" in caught.value.details()


async def test_a_stream_tells_of_changes_and_only_of_them(keda):
    scaler, stub, messages = keda
    scaler.obey(Scale(0))
    stream = stub.StreamIsActive(target(messages), timeout=20.0)
    said = [(await stream.read()).result]
    for count in (1, 2, 3, 0):
        scaler.obey(Scale(count))
        await asyncio.sleep(0.05)
    said += [(await stream.read()).result for _ in range(2)]
    assert said == [False, True, False]
    stream.cancel()


async def test_a_request_at_zero_wakes_keda(keda):
    scaler, stub, messages = keda
    policy = TargetConcurrency(requests_per_worker=4, min_workers=0, max_workers=4)
    cluster = llmd.Cluster(autoscaler=policy)
    async with Server(cluster, tick=0.02, scale=scaler.obey) as server:
        async with asyncio.timeout(10.0):
            while "" not in scaler.counts:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        stream = stub.StreamIsActive(target(messages), timeout=20.0)
        assert (await stream.read()).result is False
        ticket = server.enter(llmd.Request(id="a", prompt=[1]))
        assert (await stream.read()).result is True
        server.leave(ticket)
        stream.cancel()


async def test_the_hpa_that_keda_makes_asks_for_the_same_count(keda):
    """What KEDA passes on comes out of the HPA rules as it went in."""
    scaler, stub, messages = keda
    spec = HpaSpec(
        metrics=(External("llmd-workers", AverageValue(1)),),
        max_replicas=100,
        tolerance=0.0,
        downscale_window=0.0,
    )
    history, replicas = History(), 3
    for row, count in enumerate((5, 2, 4)):
        scaler.obey(Scale(count))
        [value] = (await metric(stub, messages)).metricValues
        scene = Scene(
            now=15.0 * row,
            replicas=replicas,
            present=replicas,
            values={"llmd-workers": [value.metricValueFloat]},
        )
        advice, history = spec.step(history, scene)
        replicas = advice.workers
        assert replicas == count


async def test_no_change_is_missed_between_two_answers(keda):
    """Changes that come while an answer is on its way count as well."""
    scaler, stub, messages = keda
    scaler.obey(Scale(1))
    stream = stub.StreamIsActive(target(messages), timeout=30.0)
    assert (await stream.read()).result is True
    for turns in range(12):
        scaler.obey(Scale(0))
        for _ in range(turns):
            await asyncio.sleep(0)
        scaler.obey(Scale(1))
        # Three messages at most: whatever it saw, it ends with what is so.
        last = True
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(0.3):
                    last = (await asyncio.shield(read_soon(stream))).result
        assert last is True


def read_soon(stream):
    """Return the read under way, or begin one: a cancelled read ends a stream."""
    if getattr(stream, "_reading", None) is None or stream._reading.done():
        stream._reading = asyncio.ensure_future(stream.read())
    return stream._reading


async def test_a_port_that_is_in_use_is_refused():
    first, second = KedaScaler(), KedaScaler()
    port = await first.listen()
    try:
        with pytest.raises(InvalidPolicy, match=str(port)):
            await second.listen(f"127.0.0.1:{port}")
    finally:
        await first.close()
        await second.close()
