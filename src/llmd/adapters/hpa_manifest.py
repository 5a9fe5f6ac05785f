"""Read a HorizontalPodAutoscaler manifest, as users write it, into an `HpaSpec`.

Needs PyYAML for text; a dict that a Kubernetes client gave works without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from ..autoscaler.behavior import (
    DOWN,
    UP,
    Behavior,
    Count,
    Percent,
    Rate,
    Rules,
    Select,
)
from ..autoscaler.hpa import (
    AverageValue,
    External,
    HpaSpec,
    Metric,
    Object,
    Pods,
    Resource,
    Utilization,
    Value,
    exact,
)
from ..errors import InvalidPolicy, shown
from ._fields import Field

Json = Mapping[str, Any]


@attrs.frozen
class Manifest:
    """A manifest's spec, and what it scales.

    Attributes:
        spec: What to do.
        kind: Of the target, such as Deployment.
        target: Its name.
        api_version: Its API, such as apps/v1.
        namespace: Where both are.
    """

    spec: HpaSpec
    kind: str
    target: str
    api_version: str
    namespace: str = "default"


def load(text: str) -> Manifest:
    """Return the only HorizontalPodAutoscaler in a YAML *text*.

    Raises:
        InvalidPolicy: There is none, or several, or it makes no sense.

    >>> load('''
    ... apiVersion: autoscaling/v2
    ... kind: HorizontalPodAutoscaler
    ... metadata: {name: vllm}
    ... spec:
    ...   scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: vllm}
    ...   maxReplicas: 4
    ...   metrics:
    ...   - type: Pods
    ...     pods:
    ...       metric: {name: vllm_num_requests_waiting}
    ...       target: {type: AverageValue, averageValue: 500m}
    ... ''').spec.metrics
    (Pods(name='vllm_num_requests_waiting', target=AverageValue(milli=500)),)
    """
    import yaml

    if not isinstance(text, str | bytes):
        raise InvalidPolicy(f"the manifest is {shown(text)}, must be a text")
    try:
        documents = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise InvalidPolicy(f"the manifest is no YAML: {error}") from error
    found = [
        document
        for listed in documents
        for document in _listed(listed)
        if isinstance(document, Mapping)
        and document.get("kind") == "HorizontalPodAutoscaler"
    ]
    if len(found) != 1:
        raise InvalidPolicy(f"{len(found)} HorizontalPodAutoscalers found, not one")
    return from_dict(found[0])


def _listed(document: Any) -> list[Any]:
    """Return the items of a list, as `kubectl get -o yaml` prints one."""
    if isinstance(document, Mapping) and str(document.get("kind")).endswith("List"):
        items = document.get("items")
        return items if isinstance(items, list) else []
    return [document]


def from_dict(manifest: Json) -> Manifest:
    """Return what a manifest says, filled in with the defaults of the API.

    Rules: kubernetes/kubernetes pkg/apis/autoscaling/validation/validation.go
    and v2/defaults.go.

    Raises:
        InvalidPolicy: It makes no sense, or is of another API than
            autoscaling/v2 (v2beta2 reads the same).  The message begins with
            the path of the field that is wrong.
    """
    top = Field(manifest, "")
    top.need("apiVersion").one_of("autoscaling/v2", "autoscaling/v2beta2")
    spec, metadata = top.need("spec"), top.get("metadata")
    target = spec.need("scaleTargetRef")
    target.only("apiVersion kind name")
    version = target.get("apiVersion")
    namespace = None if metadata is None else metadata.get("namespace")
    return Manifest(
        spec=_spec(spec),
        kind=target.need("kind").text(),
        target=target.need("name").text(),
        api_version="" if version is None else version.text(),
        namespace="default" if namespace is None else namespace.text(),
    )


def _spec(spec: Field) -> HpaSpec:
    spec.only("scaleTargetRef minReplicas maxReplicas metrics behavior")
    least, rules = spec.get("minReplicas"), spec.get("behavior")
    low = 1 if least is None else least.whole()
    high, metrics = spec.need("maxReplicas").whole(), _metrics(spec)
    behavior = None if rules is None else _behavior(rules)
    with spec.naming():
        return HpaSpec(
            min_replicas=low, max_replicas=high, metrics=metrics, behavior=behavior
        )


# Metrics ---------------------------------------------------------------------


def _metrics(spec: Field) -> tuple[Metric, ...]:
    listed = spec.get("metrics")
    entries = [] if listed is None else listed.items()
    metrics = tuple([_metric(entry) for entry in entries])
    named = [(type(m), m.name) for m in metrics if not isinstance(m, Resource)]
    if len({*named}) < len(named) and any("selector" in repr(e) for e in entries):
        # Signals have names and no labels, so they could not be told apart.
        raise InvalidPolicy("spec.metrics: two differ in their selectors alone")
    # 80 % of requested CPU is the API's own default for a missing list.
    return metrics or (Resource("cpu", Utilization(80)),)


def _metric(entry: Field) -> Metric:
    kind = entry.need("type")
    source, read = _SOURCES[kind.one_of(*_SOURCES)]
    entry.only(" ".join(["type", *[name for name, _ in _SOURCES.values()]]))
    for other, _ in _SOURCES.values():
        if other != source and entry.get(other) is not None:
            raise entry.need(other).wrong(f"must not be set where type is {kind.value}")
    return read(entry.need(source))


def _resource(source: Field) -> Metric:
    source.only("name target")
    name = source.need("name").text()
    return Resource(name, _target(source, Utilization, AverageValue))


def _container_resource(source: Field) -> Metric:
    source.only("name container target")
    name, container = source.need("name").text(), source.need("container").text()
    return Resource(name, _target(source, Utilization, AverageValue), container)


def _pods(source: Field) -> Metric:
    source.only("metric target")
    return Pods(_name(source), _target(source, AverageValue))


def _object(source: Field) -> Metric:
    source.only("describedObject metric target")
    described = source.need("describedObject")
    described.only("apiVersion kind name")
    for name in ("kind", "name"):
        described.need(name).text()
    return Object(_name(source), _target(source, Value, AverageValue))


def _external(source: Field) -> Metric:
    source.only("metric target")
    return External(_name(source), _target(source, Value, AverageValue))


# By type: the field that has the rest, and what reads it.
_SOURCES: dict[str, tuple[str, Callable[[Field], Metric]]] = {
    "Resource": ("resource", _resource),
    "ContainerResource": ("containerResource", _container_resource),
    "Pods": ("pods", _pods),
    "Object": ("object", _object),
    "External": ("external", _external),
}


def _name(source: Field) -> str:
    metric = source.need("metric")
    metric.only("name selector")
    return metric.need("name").text()


_AMOUNTS = {
    "Utilization": "averageUtilization",
    "AverageValue": "averageValue",
    "Value": "value",
}


def _target(source: Field, *kinds: type[Any]) -> Any:
    """Return the target, of one of *kinds*, with no second amount beside it."""
    target = source.need("target")
    target.only(" ".join(["type", *_AMOUNTS.values()]))
    of = {kind.__name__: kind for kind in kinds}
    kind = target.need("type").one_of(*of)
    amount = target.need(_AMOUNTS[kind])
    for other in _AMOUNTS.values():
        if other != _AMOUNTS[kind] and target.get(other) is not None:
            raise target.need(other).wrong(f"must not be set beside {_AMOUNTS[kind]}")
    value = amount.whole() if kind == "Utilization" else amount.value
    with amount.naming():
        return of[kind](value)


# Behavior --------------------------------------------------------------------


def _behavior(behavior: Field) -> Behavior:
    behavior.only("scaleUp scaleDown")
    return Behavior(
        up=_rules(behavior.get("scaleUp"), UP),
        down=_rules(behavior.get("scaleDown"), DOWN),
    )


def _rules(rules: Field | None, default: Rules) -> Rules:
    """Return rules filled in as the API server does."""
    if rules is None:
        return default
    rules.only("stabilizationWindowSeconds policies selectPolicy tolerance")
    given: dict[str, Any] = {}
    if window := rules.get("stabilizationWindowSeconds"):
        given["window"] = float(window.whole())
    if policies := rules.get("policies"):
        given["rates"] = _rates(policies)
    if select := rules.get("selectPolicy"):
        name = select.one_of(*[known.value for known in Select])
        given["select"] = Select(name)
    if tolerance := rules.get("tolerance"):
        with tolerance.naming():
            # Not in thousandths: 500u is half of one.
            given["tolerance"] = float(exact(tolerance.value))
    with rules.naming():
        return attrs.evolve(default, **given)


def _rates(policies: Field) -> tuple[Rate, ...]:
    rates = tuple([_rate(policy) for policy in policies.items()])
    if not rates:
        raise policies.wrong("must have a policy at least")
    return rates


def _rate(policy: Field) -> Rate:
    policy.only("type value periodSeconds")
    kind = Count if policy.need("type").one_of("Pods", "Percent") == "Pods" else Percent
    value, period = policy.need("value").whole(), policy.need("periodSeconds").whole()
    with policy.naming():
        return kind(value, float(period))
