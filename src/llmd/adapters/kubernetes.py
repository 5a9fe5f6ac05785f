"""Scale a Deployment or LeaderWorkerSet: patch its scale subresource.

Needs the extra `kubernetes`.  The official client is synchronous, so calls run
in a thread: one when a count changes, and one every `look` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Mapping
from typing import Any

import attrs
from kubernetes import client as k8s

from .. import commands as c
from ..autoscaler.amounts import seconds
from ..errors import EngineError, InvalidPolicy, UnknownPool, shortened, shown

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
        InvalidPolicy: It has no name, or the kind is not known and nothing
            says where it is.

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
        if not isinstance(self.name, str) or not self.name:
            raise InvalidPolicy(f"Target.name is {shown(self.name)}, not a name")
        if self.kind not in _PLURALS and not (self.group and self.plural):
            raise InvalidPolicy(f"kind {self.kind!r} needs a group and a plural")

    @property
    def path(self) -> tuple[str, str, str]:
        """Group, version and plural."""
        if self.group and self.plural:
            return self.group, self.version, self.plural
        return _PLURALS[self.kind]


def _count(replicas: int) -> int:
    if type(replicas) is not int or replicas < 0:
        raise InvalidPolicy(f"{shown(replicas)} replicas cannot be asked for")
    return replicas


@attrs.define(eq=False)
class KubernetesScaler:
    """Obeys the autoscaler of a server's cluster by patching scales.

        scaler = KubernetesScaler({"": Target(name="vllm")})
        async with Server(Cluster(autoscaler=policy), scale=scaler.obey):
            async with scaler:
                ...

    Only the newest count of each target is sent, and one that fails is sent
    again after a pause; on leaving, what is still to be sent is.  Every now and
    then it looks whether the counts are still there: one that somebody else
    changed, with `kubectl scale` say, is put back or adopted, and a warning is
    logged.  No HPA may manage the same target: the two would undo each other.

    Attributes:
        targets: By the autoscaler's name for the pool; empty without pools.
        api: Of the cluster; loaded from the surroundings by `from_environment`.
        timeout: Seconds for one call.
        pause: Seconds before a failed call is tried again.
        settle: Seconds from the start in which nothing is made smaller: workers
            that ran before this process did have to join it first.
        look: Seconds between two looks at the counts; inf: never.
        adopt: Whether a count that somebody else set stays until the
            autoscaler wants another one; else it is put back.
        grace: Seconds that leaving may take to send what is still to be sent.
        failures: Calls that failed.
        drifts: Counts that somebody else changed.

    Raises:
        InvalidPolicy: A number of seconds is negative or no number.
    """

    targets: Mapping[str, Target]
    api: Any = attrs.field(factory=k8s.ApiClient)
    timeout: float = attrs.field(default=10.0, validator=seconds)
    pause: float = attrs.field(default=5.0, validator=seconds)
    settle: float = attrs.field(default=300.0, validator=seconds)
    look: float = attrs.field(default=30.0, validator=seconds)
    adopt: bool = False
    grace: float = attrs.field(default=5.0, validator=seconds)
    failures: int = attrs.field(default=0, init=False)
    drifts: int = attrs.field(default=0, init=False)
    _wanted: dict[str, int] = attrs.field(factory=dict, init=False)
    _due: dict[str, None] = attrs.field(factory=dict, init=False)
    _changed: asyncio.Event = attrs.field(factory=asyncio.Event, init=False)
    _keeper: asyncio.Task[None] | None = attrs.field(default=None, init=False)
    _settled_at: float = attrs.field(default=math.inf, init=False)
    _leaving: bool = attrs.field(default=False, init=False)

    @classmethod
    def from_environment(
        cls, targets: Mapping[str, Target], **settings: Any
    ) -> KubernetesScaler:
        """Find the cluster: the pod's own, else the current kubeconfig."""
        from kubernetes import config

        try:
            config.load_incluster_config()
        except config.ConfigException:
            config.load_kube_config()
        return cls(targets, **settings)

    def obey(self, scale: c.Scale) -> None:
        """Send the count of a pool, in the background; others' are left alone.

        Raises:
            InvalidPolicy: It is negative, or no whole number.
        """
        if scale.pool in self.targets:
            self._wanted[scale.pool] = _count(scale.workers)
            self._owe(scale.pool)

    def replicas(self, pool: str = "") -> int:
        """Return how many are asked for now; blocks.

        Raises:
            UnknownPool: It has no target.
            EngineError: The API server refused, or did not answer.
        """
        return self._call("get", self._target(pool))

    def set_replicas(self, replicas: int, pool: str = "") -> int:
        """Ask for *replicas* and return what the API server made of it; blocks.

        Raises:
            InvalidPolicy: The count is negative, or no whole number.
            UnknownPool: It has no target.
            EngineError: The API server refused, or did not answer.
        """
        body = {"spec": {"replicas": _count(replicas)}}
        return self._call("patch", self._target(pool), body=body)

    async def __aenter__(self) -> KubernetesScaler:
        self._leaving = False
        self._settled_at = asyncio.get_running_loop().time() + self.settle
        self._keeper = asyncio.create_task(self._keep())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._keeper is None:
            return
        self._leaving = True
        self._changed.set()
        # A call that is under way ends first: cut off, it might come last.
        await asyncio.wait([self._keeper], timeout=self.grace)
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        for pool in self._due:
            _log.warning("pool %r: %d were not asked for", pool, self._wanted[pool])

    # Inside --------------------------------------------------------------

    async def _keep(self) -> None:
        """Send what is due, and look at what was sent."""
        now = asyncio.get_running_loop().time
        look_at = now() + self.look
        while True:
            self._changed.clear()
            await self._send()
            if self._leaving and not self._due:
                return
            if not self._leaving and now() >= look_at:
                await self._look()
                look_at = now() + self.look
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience(look_at - now())):
                    # A new count ends the pause: it replaces what has to wait.
                    await self._changed.wait()

    def _patience(self, look_in: float) -> float:
        if self._leaving:
            return min(self.pause, self.grace / 10)
        return max(min(self.pause, look_in) if self._due else look_in, 0.0)

    async def _send(self) -> None:
        """Send each count that is due; what fails, or has to wait, stays so."""
        for pool in [*self._due]:
            count = self._wanted[pool]
            try:
                if await self._too_early(pool, count):
                    continue
                await asyncio.to_thread(self.set_replicas, count, pool)
            except EngineError as error:
                self._fail(pool, error)
                continue
            if self._wanted[pool] == count:
                self._due.pop(pool, None)

    async def _too_early(self, pool: str, count: int) -> bool:
        """Say whether *count* would make smaller what has not settled yet."""
        if asyncio.get_running_loop().time() >= self._settled_at:
            return False
        if count >= await asyncio.to_thread(self.replicas, pool):
            return False
        if self._leaving:
            self._due.pop(pool, None)
        return True

    async def _look(self) -> None:
        """See whether somebody else changed a count."""
        for pool, count in [*self._wanted.items()]:
            if pool in self._due:
                continue
            try:
                found = await asyncio.to_thread(self.replicas, pool)
            except EngineError as error:
                self._fail(pool, error)
                continue
            if found == count or pool in self._due:
                continue
            self.drifts += 1
            done = "adopted" if self.adopt else f"put back to {count}"
            _log.warning("pool %r: somebody asked for %d, %s", pool, found, done)
            if self.adopt:
                self._wanted[pool] = found
            else:
                self._owe(pool)

    def _owe(self, pool: str) -> None:
        self._due[pool] = None
        self._changed.set()

    def _fail(self, pool: str, error: EngineError) -> None:
        self.failures += 1
        _log.warning("pool %r was not reached: %s", pool, error)

    def _target(self, pool: str) -> Target:
        if pool not in self.targets:
            known = shortened(", ".join(map(repr, self.targets)), 500)
            raise UnknownPool(f"no target for pool {shown(pool)}; known: {known}")
        return self.targets[pool]

    def _call(self, verb: str, target: Target, **body: Any) -> int:
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
        try:
            # A zero is left out of an answer.
            return int(answer["spec"].get("replicas", 0))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            where = f"{verb} scale of {target.name!r}"
            raise EngineError(f"{where}: {shown(answer)} has no count") from error
