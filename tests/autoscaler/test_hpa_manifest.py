"""A manifest loads as the API server reads it."""

import copy
import functools
import operator

import pytest

from llmd.autoscaler.behavior import DOWN, UP, Behavior, Count, Percent, Rules, Select
from llmd.autoscaler.hpa import (
    AverageValue,
    External,
    Object,
    Pods,
    Resource,
    Utilization,
    Value,
)
from llmd.errors import InvalidPolicy

manifests = pytest.importorskip("llmd.adapters.hpa_manifest")
pytest.importorskip("yaml")

HEAD = """
apiVersion: v1
kind: Service
metadata: {name: other}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: decode, namespace: llm}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: decode}
"""
FULL = (
    HEAD
    + """
  minReplicas: 2
  maxReplicas: 8
  behavior:
    scaleUp:
      stabilizationWindowSeconds: 0
      tolerance: 50m
      policies:
      - {type: Pods, value: 4, periodSeconds: 60}
      - {type: Percent, value: 200, periodSeconds: 15}
      selectPolicy: Min
    scaleDown:
      stabilizationWindowSeconds: 600
  metrics:
  - type: Resource
    resource: {name: cpu, target: {type: Utilization, averageUtilization: 60}}
  - type: Resource
    resource: {name: memory, target: {type: AverageValue, averageValue: 8Gi}}
  - type: ContainerResource
    containerResource:
      name: cpu
      container: vllm
      target: {type: Utilization, averageUtilization: 70}
  - type: Pods
    pods:
      metric: {name: running}
      target: {type: AverageValue, averageValue: "10"}
  - type: Object
    object:
      describedObject: {kind: InferencePool, name: pool}
      metric: {name: inference_pool_average_queue_size}
      target: {type: Value, value: 5}
  - type: External
    external:
      metric: {name: kv, selector: {matchLabels: {pool: a}}}
      target: {type: AverageValue, averageValue: 0.8}
"""
)


def test_every_field_is_read():
    manifest = manifests.load(FULL)
    assert (manifest.kind, manifest.target, manifest.namespace) == (
        "Deployment",
        "decode",
        "llm",
    )
    spec = manifest.spec
    assert (spec.min_replicas, spec.max_replicas) == (2, 8)
    assert spec.metrics == (
        Resource("cpu", Utilization(60)),
        Resource("memory", AverageValue(8 * 2**30)),
        Resource("cpu", Utilization(70), "vllm"),
        Pods("running", AverageValue(10)),
        Object("inference_pool_average_queue_size", Value(5)),
        External("kv", AverageValue("800m")),
    )
    assert spec.behavior == Behavior(
        up=Rules(
            window=0.0,
            rates=(Count(4, 60.0), Percent(200, 15.0)),
            select=Select.MIN,
            tolerance=0.05,
        ),
        down=Rules(window=600.0, rates=(Percent(100, 15.0),)),
    )


def test_defaults_are_those_of_the_api():
    spec = manifests.load(HEAD + "  maxReplicas: 3\n").spec
    assert (spec.min_replicas, spec.behavior) == (1, None)
    assert spec.metrics == (Resource("cpu", Utilization(80)),)
    behavior = "  behavior: {scaleUp: {stabilizationWindowSeconds: 30}}\n"
    spec = manifests.load(HEAD + "  maxReplicas: 3\n" + behavior).spec
    assert spec.behavior.up.rates == (Count(4, 15.0), Percent(100, 15.0))
    assert spec.behavior.up.window == 30
    assert spec.behavior.down == DOWN
    spec = manifests.load(HEAD + "  maxReplicas: 3\n  behavior: {}\n").spec
    assert (spec.behavior.up, spec.behavior.down) == (UP, DOWN)


WRONG = {
    "no document": "kind: Service",
    "two": FULL + "---" + FULL,
    "no YAML": "a: [",
    "no max": HEAD,
    "max is text": HEAD + "  maxReplicas: many",
    "min over max": HEAD + "  maxReplicas: 3\n  minReplicas: 4",
    "zero on CPU": HEAD + "  maxReplicas: 3\n  minReplicas: 0",
    "no quantity": FULL.replace("8Gi", "8GG"),
    "target of zero": FULL.replace("value: 5", "value: 0"),
    "long window": FULL.replace("600", "3601"),
    "long period": FULL.replace("periodSeconds: 60", "periodSeconds: 1801"),
    "no change": FULL.replace("value: 4", "value: 0"),
    "no policies": HEAD + "  maxReplicas: 3\n  behavior: {scaleUp: {policies: []}}",
    "policy type": FULL.replace("type: Pods, value", "type: Nodes, value"),
    "select": FULL.replace("Min\n", "Median\n"),
    "metric type": FULL.replace("type: External", "type: Internal"),
    "utilization of a pool": FULL.replace("type: Value, value", "averageUtilization"),
    "unknown field": HEAD + "  maxReplicas: 3\n  maxReplica: 4",
    "unknown rule": HEAD + "  maxReplicas: 3\n  behavior: {scaleUp: {window: 3}}",
    "behavior of lists": HEAD + "  maxReplicas: 3\n  behavior: [1]",
    "rules of text": HEAD + "  maxReplicas: 3\n  behavior: {scaleUp: fast}",
    "policies of a number": HEAD
    + "  maxReplicas: 3\n  behavior: {scaleUp: {policies: 3}}",
    "metrics of a number": HEAD + "  maxReplicas: 3\n  metrics: 5",
    "type of a number": HEAD + "  maxReplicas: 3\n  metrics: [{type: 5}]",
    "window of text": FULL.replace("600", "abc"),
    "metadata of text": FULL.replace("metadata:", "metadata: x\nelse:"),
    "selectors alone": HEAD
    + """  maxReplicas: 3
  metrics:
  - type: External
    external:
      metric: {name: q, selector: {matchLabels: {pool: a}}}
      target: {type: AverageValue, averageValue: 5}
  - type: External
    external:
      metric: {name: q, selector: {matchLabels: {pool: b}}}
      target: {type: AverageValue, averageValue: 5}
""",
    "old API": FULL.replace("autoscaling/v2", "autoscaling/v1"),
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_nonsense_is_refused(text):
    with pytest.raises(InvalidPolicy):
        manifests.load(text)


BESIDE = "type: AverageValue, averageValue: "
# What is wrong, in FULL: replaced, by, and how the message begins.
NAMED = {
    "no container": (
        "      container: vllm\n",
        "",
        "spec.metrics[2].containerResource.container is missing",
    ),
    "empty container": (
        "container: vllm",
        'container: ""',
        "spec.metrics[2].containerResource.container is ''",
    ),
    "no resource": (
        "name: cpu\n      container",
        "container",
        "spec.metrics[2].containerResource.name is missing",
    ),
    "no described object": (
        "      describedObject: {kind: InferencePool, name: pool}\n",
        "",
        "spec.metrics[4].object.describedObject is missing",
    ),
    "described by no name": (
        "InferencePool, name: pool",
        "InferencePool",
        "spec.metrics[4].object.describedObject.name is missing",
    ),
    "no metric": (
        "metric: {name: inference_pool_average_queue_size}",
        "metric: {}",
        "spec.metrics[4].object.metric.name is missing",
    ),
    "no target": (
        "      target: {type: Value, value: 5}\n",
        "",
        "spec.metrics[4].object.target is missing",
    ),
    "no amount": (
        "type: Value, value: 5",
        "type: Value",
        "spec.metrics[4].object.target.value is missing",
    ),
    "no type": (
        "type: Value, value: 5",
        "value: 5",
        "spec.metrics[4].object.target.type is missing",
    ),
    "two amounts": (
        "type: Value, value: 5",
        "type: Value, value: 5, averageValue: 3",
        "spec.metrics[4].object.target.averageValue is 3, must not be set beside value",
    ),
    "two amounts of a series": (
        f"{BESIDE}0.8",
        f"{BESIDE}0.8, value: 3",
        "spec.metrics[5].external.target.value is 3, must not be set beside",
    ),
    "two amounts of a resource": (
        f"{BESIDE}8Gi",
        f"{BESIDE}8Gi, averageUtilization: 3",
        "spec.metrics[1].resource.target.averageUtilization is 3, must not be set",
    ),
    "an amount of no kind": (
        "averageValue: 8Gi",
        "averageValue: 8GG",
        "spec.metrics[1].resource.target.averageValue: '8GG' is no quantity",
    ),
    "a value of each pod": (
        f'{BESIDE}"10"',
        "type: Value, value: 10",
        "spec.metrics[3].pods.target.type is 'Value', must be AverageValue",
    ),
    "a slip of the pen": (
        "metric: {name: running}",
        "metric: {name: running, selectors: {}}",
        "spec.metrics[3].pods.metric has unknown fields: selectors",
    ),
    "two sources": (
        "  - type: Pods\n    pods",
        "  - type: Pods\n    object: {}\n    pods",
        "spec.metrics[3].object is {}, must not be set where type is Pods",
    ),
    "a rate of text": (
        "value: 4, periodSeconds",
        "value: four, periodSeconds",
        "spec.behavior.scaleUp.policies[0].value is 'four', must be a whole number",
    ),
    "a long period": (
        "periodSeconds: 15",
        "periodSeconds: 1801",
        "spec.behavior.scaleUp.policies[1]: period is 1801.0 s",
    ),
    "a long window": (
        "stabilizationWindowSeconds: 600",
        "stabilizationWindowSeconds: 3601",
        "spec.behavior.scaleDown: window is 3601.0 s",
    ),
    "a negative tolerance": (
        "tolerance: 50m",
        "tolerance: -50m",
        "spec.behavior.scaleUp: tolerance is -0.05",
    ),
    "a bound of text": (
        "minReplicas: 2",
        "minReplicas: two",
        "spec.minReplicas is 'two', must be a whole number",
    ),
}


@pytest.mark.parametrize(("old", "new", "said"), NAMED.values(), ids=NAMED)
def test_what_is_refused_is_named_by_its_path(old, new, said):
    assert FULL.count(old) == 1
    with pytest.raises(InvalidPolicy) as caught:
        manifests.load(FULL.replace(old, new))
    assert str(caught.value).startswith(said)


def test_a_tolerance_is_kept_to_the_last_digit():
    spec = manifests.load(FULL.replace("50m", "500u")).spec
    assert spec.behavior.up.tolerance == 0.0005


def places(value, path=()):
    """Yield the path of every value within *value*."""
    yield path
    pairs = ()
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        yield from places(inner, (*path, key))


JUNK = {
    "null": None,
    "empty": "",
    "text": "x",
    "whole": 5,
    "negative": -1,
    "part": 2.5,
    "true": True,
    "list": [5],
    "object": {5: 6},
    "long": "x" * 9999,
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
def test_junk_anywhere_is_taken_or_refused_in_short(junk):
    import yaml

    [*_, whole] = yaml.safe_load_all(FULL)
    for path in places(whole):
        document, refused = copy.deepcopy(whole), ""
        if not path:
            document = junk
        else:
            *outer, last = path
            functools.reduce(operator.getitem, outer, document)[last] = junk
        try:
            manifests.from_dict(document)
        except InvalidPolicy as error:
            refused = str(error)
        assert len(refused) < 300


def test_a_list_is_read_as_kubectl_prints_one():
    import yaml

    documents = [*yaml.safe_load_all(FULL)]
    for kind in ("List", "HorizontalPodAutoscalerList"):
        listed = yaml.safe_dump({"apiVersion": "v1", "kind": kind, "items": documents})
        assert manifests.load(listed) == manifests.load(FULL)


@pytest.mark.parametrize("quantity", [" 5", "5 ", "\u0665", "5\n"])
def test_a_quantity_has_no_blanks_and_only_our_digits(quantity):
    with pytest.raises(InvalidPolicy, match="no quantity"):
        AverageValue(quantity)


def test_no_text_is_no_manifest():
    with pytest.raises(InvalidPolicy, match="the manifest is None, must be a text"):
        manifests.load(None)
