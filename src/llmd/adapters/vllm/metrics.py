"""What a vLLM server says of itself on `/metrics`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import attrs

from ...types import Signals

# A page has some 900 lines and 80 KB; parsing only these takes a tenth.
_WANTED = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:engine_sleep_state",
    "vllm:cache_config_info",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:external_prefix_cache_queries_total",
    "vllm:external_prefix_cache_hits_total",
    "vllm:prompt_tokens_by_source_total",
    "vllm:num_preemptions_total",
    "vllm:request_success_total",
)


@attrs.frozen(kw_only=True)
class EngineMetrics:
    """One engine of a server; NaN or 0 for what it does not tell.

    Attributes:
        signals: As the router reads them.
        asleep: In one of vLLM's sleep levels.
        block_tokens: Tokens a block.
        kv_blocks: Blocks of its KV cache.
        prefix_queries: Prompt tokens looked up in the prefix cache, so far.
        prefix_hits: Of them, found.
        external_queries: Looked up through a KV connector.
        external_hits: Of them, found.
        computed_tokens: Prompt tokens computed here.
        preemptions: Requests put back for want of memory.
        finished: Requests by the reason they ended for.
    """

    signals: Signals = attrs.field(factory=Signals)
    asleep: bool = False
    block_tokens: int = 0
    kv_blocks: int = 0
    prefix_queries: float = 0.0
    prefix_hits: float = 0.0
    external_queries: float = 0.0
    external_hits: float = 0.0
    computed_tokens: float = math.nan
    preemptions: float = 0.0
    finished: Mapping[str, float] = attrs.field(factory=dict)


def read_metrics(page: str) -> dict[str, EngineMetrics]:
    """Return what each engine of a server tells, by its `engine` label.

    A server with one engine calls it "0".  Unknown metrics are ignored.

    Raises:
        ValueError: The page is not Prometheus text.

    >>> page = 'vllm:num_requests_running{engine="0",model_name="m"} 3.0'
    >>> read_metrics(page)["0"].signals.running_requests
    3.0
    """
    engines: dict[str, dict[str, dict[str, float]]] = {}
    for name, labels, value in _samples(page):
        metrics = engines.setdefault(labels.get("engine", "0"), {})
        by_label = metrics.setdefault(name.removeprefix("vllm:"), {})
        if name == "vllm:cache_config_info":
            for key in ("block_size", "num_gpu_blocks"):
                told = labels.get(key, "")
                by_label[key] = float(told) if told.isdigit() else math.nan
        else:
            key = labels.get("finished_reason") or labels.get("source", "")
            key = labels.get("sleep_state", key)
            by_label[key] = by_label.get(key, 0.0) + value
    return {engine: _metrics(metrics) for engine, metrics in engines.items()}


def combined(engines: Mapping[str, EngineMetrics]) -> Signals:
    """Return the signals of a server as of one worker: sums, and mean usage."""
    if not engines:
        return Signals()
    signals = [engine.signals for engine in engines.values()]
    return Signals(
        waiting_requests=sum(s.waiting_requests for s in signals),
        running_requests=sum(s.running_requests for s in signals),
        kv_usage=sum(s.kv_usage for s in signals) / len(signals),
    )


def _samples(page: str) -> Iterator[tuple[str, dict[str, str], float]]:
    from prometheus_client.parser import text_string_to_metric_families

    lines = "\n".join(x for x in page.splitlines() if x.startswith(_WANTED))
    for family in text_string_to_metric_families(lines + "\n"):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def _metrics(found: Mapping[str, Mapping[str, float]]) -> EngineMetrics:
    def total(name: str, missing: float = 0.0) -> float:
        return sum(found[name].values()) if name in found else missing

    config = found.get("cache_config_info", {})
    states = found.get("engine_sleep_state", {})
    sources = found.get("prompt_tokens_by_source_total", {})
    return EngineMetrics(
        signals=Signals(
            waiting_requests=total("num_requests_waiting", math.nan),
            running_requests=total("num_requests_running", math.nan),
            kv_usage=total("kv_cache_usage_perc", math.nan),
        ),
        asleep=any(on for state, on in states.items() if state != "awake"),
        block_tokens=_count(config.get("block_size")),
        # One of them is the null block, which holds nothing.
        kv_blocks=max(_count(config.get("num_gpu_blocks")) - 1, 0),
        prefix_queries=total("prefix_cache_queries_total"),
        prefix_hits=total("prefix_cache_hits_total"),
        external_queries=total("external_prefix_cache_queries_total"),
        external_hits=total("external_prefix_cache_hits_total"),
        computed_tokens=sources.get("local_compute", math.nan),
        preemptions=total("num_preemptions_total"),
        finished=dict(found.get("request_success_total", {})),
    )


def _count(value: float | None) -> int:
    return int(value) if value and math.isfinite(value) else 0
