"""Scale a Deployment or LeaderWorkerSet: patch its scale subresource.

Needs the extra `kubernetes`.  The official client is synchronous, so calls run
in a thread, and one is made only when the count changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import attrs
from kubernetes import client as k8s

from .. import commands as c
from ..errors import EngineError, InvalidPolicy

_log = logging.getLogger("llmd.kubernetes")

# Plural names of what has a scale subresource and serves models.
_PLURALS = {
    "Deployment": ("apps", "v1", "deployments"),
    "StatefulSet": ("apps", "v1", "statefulsets"),
    "ReplicaSet": ("apps", "v1", "replicasets"),
    "LeaderWorkerSet": ("leaderworkerset.x-k8s.io", "v1", "leaderworkersets"),
}


@attrs.frozen(kw_only=True)
class Target:
    """Something in a cluster that has a scale subresource.

    Attributes:
        name: Its name.
        kind: A kind known here, or give the next three.
        namespace: Where it is.
        group: Of its API; empty: that of the kind.
        version: Of its API.
        plural: As its URL has it.

    Raises:
        InvalidPolicy: The kind is not known and nothing says where it is.

    >>> Target(name="decode", kind="LeaderWorkerSet").path
    ('leaderworkerset.x-k8s.io', 'v1', 'leaderworkersets')
    """

    name: str
    kind: str = "Deployment"
    namespace: str = "default"
    group: str = ""
    version: str = "v1"
    plural: str = ""

    def __attrs_post_init__(self) -> None:
        if self.kind not in _PLURALS and not (self.group and self.plural):
            raise InvalidPolicy(f"kind {self.kind!r} needs a group and a plural")

    @property
    def path(self) -> tuple[str, str, str]:
        """Group, version and plural."""
        if self.group and self.plural:
            return self.group, self.version, self.plural
        return _PLURALS[self.kind]


@attrs.define(eq=False)
class KubernetesScaler:
    """Obeys the autoscaler of a server's cluster by patching scales.

        scaler = KubernetesScaler({"": Target(name="vllm")})
        async with Server(Cluster(autoscaler=policy), scale=scaler.obey):
            async with scaler:
                ...

    Only the newest count of each target is sent, and one that fails is sent
    again after a pause.  No HPA may manage the same target.

    Attributes:
        targets: By the autoscaler's name for the pool; empty without pools.
        api: Of the cluster; loaded from the surroundings by `from_environment`.
        timeout: Seconds for one call.
        pause: Seconds before a failed call is tried again.
        settle: Seconds from the start in which nothing is made smaller: workers
            that ran before this process did have to join it first.
        failures: Calls that failed.
    """

    targets: Mapping[str, Target]
    api: Any = attrs.field(factory=k8s.ApiClient)
    timeout: float = 10.0
    pause: float = 5.0
    settle: float = 300.0
    failures: int = attrs.field(default=0, init=False)
    _wanted: dict[str, int] = attrs.field(factory=dict, init=False)
    _changed: asyncio.Event = attrs.field(factory=asyncio.Event, init=False)
    _sender: asyncio.Task[None] | None = attrs.field(default=None, init=False)

    @classmethod
    def from_environment(cls, targets: Mapping[str, Target]) -> KubernetesScaler:
        """Find the cluster: the pod's own, else the current kubeconfig."""
        from kubernetes import config

        try:
            config.load_incluster_config()
        except config.ConfigException:
            config.load_kube_config()
        return cls(targets)

    def obey(self, scale: c.Scale) -> None:
        """Send the count of a pool, in the background."""
        if scale.pool in self.targets:
            self._wanted[scale.pool] = scale.workers
            self._changed.set()

    def replicas(self, pool: str = "") -> int:
        """Return how many are asked for now; blocks.

        Raises:
            EngineError: The API server refused, or did not answer.
        """
        scale = self._call("get", self.targets[pool])
        return int(scale.get("spec", {}).get("replicas", 0))

    def set_replicas(self, replicas: int, pool: str = "") -> int:
        """Ask for *replicas* and return what the API server made of it; blocks.

        Raises:
            EngineError: The API server refused, or did not answer.
        """
        body = {"spec": {"replicas": replicas}}
        scale = self._call("patch", self.targets[pool], body=body)
        return int(scale.get("spec", {}).get("replicas", 0))

    async def __aenter__(self) -> KubernetesScaler:
        self._sender = asyncio.create_task(self._send())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)

    async def _send(self) -> None:
        loop = asyncio.get_running_loop()
        settled = loop.time() + self.settle
        while True:
            await self._changed.wait()
            self._changed.clear()
            wanted, self._wanted = self._wanted, {}
            settling = loop.time() < settled
            for pool, replicas in wanted.items():
                try:
                    if settling and replicas < await asyncio.to_thread(
                        self.replicas, pool
                    ):
                        self._wanted.setdefault(pool, replicas)
                        continue
                    await asyncio.to_thread(self.set_replicas, replicas, pool)
                except EngineError as error:
                    self.failures += 1
                    _log.warning("pool %r was not scaled: %s", pool, error)
                    self._wanted.setdefault(pool, replicas)
            if self._wanted:
                # A new count may end the pause: it replaces what has to wait.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.pause):
                        await self._changed.wait()
                self._changed.set()

    def _call(self, verb: str, target: Target, **body: Any) -> Mapping[str, Any]:
        group, version, plural = target.path
        api = k8s.CustomObjectsApi(self.api)
        call = getattr(api, f"{verb}_namespaced_custom_object_scale")
        try:
            answer = call(
                group,
                version,
                target.namespace,
                plural,
                target.name,
                _request_timeout=self.timeout,
                **body,
            )
        except Exception as error:
            status = getattr(error, "status", None)
            what = f"{status} {error.reason}" if status else repr(error)  # type: ignore[attr-defined]
            where = f"{target.kind} {target.namespace}/{target.name}"
            raise EngineError(f"{verb} scale of {where}: {what}") from error
        if not isinstance(answer, Mapping):
            raise EngineError(f"{verb} scale of {target.name!r}: {answer!r}")
        return answer
