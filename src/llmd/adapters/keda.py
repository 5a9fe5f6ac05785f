"""A KEDA external scaler: KEDA scales, llmd says to how many.

Needs the extra `keda`.  The interface is that of kedacore/keda,
pkg/scalers/externalscaler/externalscaler.proto (Apache-2.0); its few messages
are declared here, so that nothing has to be generated.

In a ScaledObject, with `metricType: AverageValue`:

    triggers:
    - type: external-push
      metadata: {scalerAddress: "llmd.default:6000", pool: ""}
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import attrs
import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from .. import commands as c
from ..errors import InvalidPolicy, shortened, shown

SERVICE = "externalscaler.ExternalScaler"
METRIC = "llmd-workers"

# Message -> fields by number: name, type, repeated.
_STRING, _BOOL, _INT64, _DOUBLE = "STRING", "BOOL", "INT64", "DOUBLE"
_MESSAGES: dict[str, tuple[tuple[str, str, bool], ...]] = {
    "IsActiveResponse": (("result", _BOOL, False),),
    "GetMetricSpecResponse": (("metricSpecs", "MetricSpec", True),),
    "MetricSpec": (
        ("metricName", _STRING, False),
        ("targetSize", _INT64, False),
        ("targetSizeFloat", _DOUBLE, False),
    ),
    "GetMetricsRequest": (
        ("scaledObjectRef", "ScaledObjectRef", False),
        ("metricName", _STRING, False),
    ),
    "GetMetricsResponse": (("metricValues", "MetricValue", True),),
    "MetricValue": (
        ("metricName", _STRING, False),
        ("metricValue", _INT64, False),
        ("metricValueFloat", _DOUBLE, False),
    ),
    "ScaledObjectRef": (
        ("name", _STRING, False),
        ("namespace", _STRING, False),
        ("scalerMetadata", "ScaledObjectRef.ScalerMetadataEntry", True),
    ),
}


def _declare() -> dict[str, Any]:
    """Return the message classes by name."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="externalscaler.proto", package="externalscaler", syntax="proto3"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind, repeated) in enumerate(fields, 1):
            scalar = kind.isupper()
            message.field.add(
                name=field,
                number=number,
                type=kinds.Type.Value(f"TYPE_{kind if scalar else 'MESSAGE'}"),
                type_name=None if scalar else f".externalscaler.{kind}",
                label=kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL,
            )
        if name == "ScaledObjectRef":
            entry = message.nested_type.add(name="ScalerMetadataEntry")
            entry.options.map_entry = True
            for number, field in enumerate(("key", "value"), 1):
                entry.field.add(
                    name=field,
                    number=number,
                    type=kinds.TYPE_STRING,
                    label=kinds.LABEL_OPTIONAL,
                )
    # A pool of its own: a program may have generated the same file elsewhere.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(
            pool.FindMessageTypeByName(f"externalscaler.{name}")
        )
        for name in _MESSAGES
    }


MESSAGES = _declare()


@attrs.define(eq=False)
class KedaScaler:
    """Answers KEDA with what the autoscaler of a server's cluster wants.

    The metric is the count itself with a target of 1, so that the HPA which
    KEDA makes asks for exactly that many; KEDA drives 0 <-> 1.  `StreamIsActive`
    tells at once when the first request waits at zero.

        keda = KedaScaler()
        async with Server(Cluster(autoscaler=policy), scale=keda.obey):
            port = await keda.listen("0.0.0.0:6000")

    Attributes:
        counts: Workers wanted, by the autoscaler's name for the pool.
    """

    counts: dict[str, int] = attrs.field(factory=dict, init=False)
    _heard: int = attrs.field(default=0, init=False)
    _changed: asyncio.Condition = attrs.field(factory=asyncio.Condition, init=False)
    _server: Any = attrs.field(default=None, init=False)
    _errands: set[asyncio.Task[None]] = attrs.field(factory=set, init=False)

    def obey(self, scale: c.Scale) -> None:
        """Answer with *scale* from now on."""
        self.counts[scale.pool] = scale.workers
        self._heard += 1
        task = asyncio.create_task(self._tell())
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def listen(self, address: str = "127.0.0.1:0") -> int:
        """Serve on *address* until `close`, and return the port.

        Raises:
            InvalidPolicy: The address is in use, or none.
        """
        # Else a second scaler on the port would be taken, and asked by turns.
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        self._server.add_generic_rpc_handlers((self._handlers(),))
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise InvalidPolicy(f"{address} cannot be served on: {error}") from error
        await self._server.start()
        return int(port)

    async def close(self) -> None:
        """Stop serving; streams end."""
        if self._server is not None:
            await self._server.stop(grace=1.0)

    async def is_active(self, request: Any, context: Any) -> Any:
        """Say whether there is anything to do."""
        return self._active(await self._count(request, context))

    async def stream_is_active(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Say so again whenever it changes."""
        said: bool | None = None
        while True:
            heard = self._heard
            active = await self._count(request, context) > 0
            if active is not said:
                said = active
                yield self._active(int(active))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(60.0), self._changed:
                    # What changed since the count was read counts as well.
                    await self._changed.wait_for(partial(self._moved_on, heard))

    def _moved_on(self, heard: int) -> bool:
        return self._heard != heard

    async def get_metric_spec(self, request: Any, context: Any) -> Any:
        """Name the metric: workers, of which each worker makes one."""
        spec = MESSAGES["MetricSpec"](
            metricName=METRIC, targetSize=1, targetSizeFloat=1.0
        )
        return MESSAGES["GetMetricSpecResponse"](metricSpecs=[spec])

    async def get_metrics(self, request: Any, context: Any) -> Any:
        """Say how many workers are wanted; KEDA asks for what the spec named."""
        if request.metricName != METRIC:
            asked = shown(request.metricName)
            code = grpc.StatusCode.NOT_FOUND
            await context.abort(code, f"no metric {asked}; known: {METRIC!r}")
        count = await self._count(request.scaledObjectRef, context)
        value = MESSAGES["MetricValue"](
            metricName=METRIC, metricValue=count, metricValueFloat=float(count)
        )
        return MESSAGES["GetMetricsResponse"](metricValues=[value])

    async def _count(self, target: Any, context: Any) -> int:
        pool = target.scalerMetadata.get("pool", "")
        if pool not in self.counts:
            # KEDA holds the count on an error; a zero would let the fleet go.
            known = shortened(", ".join(map(repr, sorted(self.counts))), 500)
            code = grpc.StatusCode.UNAVAILABLE
            said = f"no count for pool {shown(pool)}; known: {known or 'none yet'}"
            await context.abort(code, said)
        return self.counts[pool]

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _active(self, count: int) -> Any:
        return MESSAGES["IsActiveResponse"](result=count > 0)

    def _handlers(self) -> Any:
        target, metrics = MESSAGES["ScaledObjectRef"], MESSAGES["GetMetricsRequest"]
        unary, stream = (
            grpc.unary_unary_rpc_method_handler,
            grpc.unary_stream_rpc_method_handler,
        )
        calls = {
            "IsActive": (unary, self.is_active, target),
            "StreamIsActive": (stream, self.stream_is_active, target),
            "GetMetricSpec": (unary, self.get_metric_spec, target),
            "GetMetrics": (unary, self.get_metrics, metrics),
        }
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                name: make(
                    call,
                    request_deserializer=taken.FromString,
                    response_serializer=lambda answer: answer.SerializeToString(),
                )
                for name, (make, call, taken) in calls.items()
            },
        )
