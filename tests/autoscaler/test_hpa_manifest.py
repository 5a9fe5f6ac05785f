"""A manifest loads as the API server reads it."""

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
