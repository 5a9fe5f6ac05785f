"""Read a HorizontalPodAutoscaler manifest, as users write it, into an `HpaSpec`.

Needs PyYAML for text; a dict that a Kubernetes client gave works without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from ..autoscaler.behavior import DOWN, UP, Behavior, Count, Percent, Rules, Select
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
    milli,
)
from ..errors import InvalidPolicy

Json = Mapping[str, Any]
_RULES = "stabilizationWindowSeconds policies selectPolicy tolerance"


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

    try:
        documents = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise InvalidPolicy(f"the manifest is no YAML: {error}") from error
    found = [
        document
        for document in documents
        if isinstance(document, Mapping)
        and document.get("kind") == "HorizontalPodAutoscaler"
    ]
    if len(found) != 1:
        raise InvalidPolicy(f"{len(found)} HorizontalPodAutoscalers found, not one")
    return from_dict(found[0])


def from_dict(manifest: Json) -> Manifest:
    """Return what a manifest says, filled in with the defaults of the API.

    Raises:
        InvalidPolicy: It makes no sense, or is of another API than
            autoscaling/v2 (v2beta2 reads the same).
    """
    try:
        return _manifest(manifest)
    except InvalidPolicy:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidPolicy(f"the manifest makes no sense: {error}") from error


def _manifest(manifest: Json) -> Manifest:
    version = manifest.get("apiVersion")
    if version not in ("autoscaling/v2", "autoscaling/v2beta2"):
        raise InvalidPolicy(f"apiVersion is {version!r}, must be autoscaling/v2")
    spec = _need(manifest, "spec", "the manifest")
    target = _need(spec, "scaleTargetRef", "spec")
    return Manifest(
        spec=_spec(spec),
        kind=_need(target, "kind", "scaleTargetRef"),
        target=_need(target, "name", "scaleTargetRef"),
        api_version=target.get("apiVersion", ""),
        namespace=(manifest.get("metadata") or {}).get("namespace", "default"),
    )


def _spec(spec: Json) -> HpaSpec:
    _known(spec, "spec", "scaleTargetRef minReplicas maxReplicas metrics behavior")
    low = spec.get("minReplicas")
    # 80 % of requested CPU is the API's own default for a missing list.
    entries = spec.get("metrics") or ()
    metrics = tuple([_metric(entry) for entry in entries])
    named = [(type(m), m.name) for m in metrics if not isinstance(m, Resource)]
    if len({*named}) < len(named) and any("selector" in repr(e) for e in entries):
        # Signals have names and no labels, so they could not be told apart.
        raise InvalidPolicy("two metrics differ in their selectors alone")
    return HpaSpec(
        min_replicas=1 if low is None else _whole(low, "minReplicas"),
        max_replicas=_whole(_need(spec, "maxReplicas", "spec"), "maxReplicas"),
        metrics=metrics or (Resource("cpu", Utilization(80)),),
        behavior=None if spec.get("behavior") is None else _behavior(spec["behavior"]),
    )


def _metric(entry: Json) -> Metric:
    kind = _need(entry, "type", "a metric")
    field = kind[:1].lower() + kind[1:]
    source = _need(entry, field, f"a {kind} metric")
    target = _target(_need(source, "target", field), kind)
    if kind in ("Resource", "ContainerResource"):
        container = source.get("container", "") if kind == "ContainerResource" else ""
        if not isinstance(target, Value):
            return Resource(_need(source, "name", field), target, container)
        raise InvalidPolicy(f"{field}.target is a Value, which no pod has its share of")
    if isinstance(target, Utilization):
        raise InvalidPolicy(f"{field}.target is a Utilization, of what?")
    name = _need(_need(source, "metric", field), "name", f"{field}.metric")
    if kind == "Pods":
        if isinstance(target, AverageValue):
            return Pods(name, target)
        raise InvalidPolicy("pods.target must be an AverageValue")
    if kind == "Object":
        return Object(name, target)
    if kind == "External":
        return External(name, target)
    raise InvalidPolicy(f"a metric's type is {kind!r}, which is none")


def _target(target: Json, kind: str) -> Utilization | AverageValue | Value:
    of = target.get("type")
    if "averageUtilization" in target and of in (None, "Utilization"):
        percent = _whole(target["averageUtilization"], "averageUtilization")
        return Utilization(percent)
    if "averageValue" in target and of in (None, "AverageValue"):
        return AverageValue(target["averageValue"])
    if "value" in target and of in (None, "Value"):
        return Value(target["value"])
    raise InvalidPolicy(f"the target of a {kind} metric, {dict(target)}, has no amount")


def _behavior(behavior: Json) -> Behavior:
    _known(behavior, "behavior", "scaleUp scaleDown")
    return Behavior(
        up=_rules(behavior.get("scaleUp"), UP),
        down=_rules(behavior.get("scaleDown"), DOWN),
    )


def _rules(rules: Json | None, default: Rules) -> Rules:
    """Return rules filled in as the API server does."""
    if rules is None:
        return default
    _known(rules, "rules", _RULES)
    window = rules.get("stabilizationWindowSeconds")
    tolerance = rules.get("tolerance")
    rates = default.rates
    if rules.get("policies") is not None:
        rates = tuple([_rate(policy) for policy in rules["policies"]])
        if not rates:
            raise InvalidPolicy("policies is empty, must name at least one")
    return Rules(
        window=default.window
        if window is None
        else float(_whole(window, "stabilizationWindowSeconds")),
        rates=rates,
        select=_select(rules.get("selectPolicy") or "Max"),
        tolerance=None if tolerance is None else milli(tolerance) / 1000,
    )


def _select(name: str) -> Select:
    try:
        return Select(name)
    except ValueError:
        known = ", ".join(select.value for select in Select)
        raise InvalidPolicy(f"selectPolicy is {name!r}, must be of {known}") from None


def _rate(policy: Json) -> Count | Percent:
    _known(policy, "a policy", "type value periodSeconds")
    kind = _need(policy, "type", "a policy")
    if kind not in ("Pods", "Percent"):
        raise InvalidPolicy(f"a policy's type is {kind!r}, must be Pods or Percent")
    value = _whole(_need(policy, "value", "a policy"), "value")
    period = _whole(_need(policy, "periodSeconds", "a policy"), "periodSeconds")
    return (Count if kind == "Pods" else Percent)(value, float(period))


def _known(mapping: Any, where: str, fields: str) -> None:
    """Refuse what nobody reads: most often it is a slip of the pen."""
    if not isinstance(mapping, Mapping):
        raise InvalidPolicy(f"{where} is {mapping!r}, must be an object")
    if unknown := sorted(map(str, mapping.keys() - {*fields.split()})):
        raise InvalidPolicy(f"{where} has unknown fields: {', '.join(unknown)}")


def _need(mapping: Any, key: str, where: str) -> Any:
    if not isinstance(mapping, Mapping) or mapping.get(key) is None:
        raise InvalidPolicy(f"{where} has no {key}")
    return mapping[key]


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidPolicy(f"{name} is {value!r}, must be a whole number")
    return value
