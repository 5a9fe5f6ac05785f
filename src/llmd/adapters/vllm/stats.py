"""What an engine in this process says of itself after each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from ...types import Signals


def listener(
    signals: Callable[[Signals], None], counters: Counter[str]
) -> Callable[..., Any]:
    """Return what vLLM calls a stat logger factory.

    Args:
        signals: Called on the event loop after each step.
        counters: Counted up after each step, as `count` does.
    """
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Listener(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(
            self,
            scheduler_stats: Any = None,
            iteration_stats: Any = None,
            *_args: Any,
            **_kwargs: Any,
        ) -> None:
            count(counters, scheduler_stats, iteration_stats)
            if scheduler_stats is not None:
                signals(_signals(scheduler_stats))

        def log_engine_initialized(self) -> None:
            pass

    return Listener


def count(counters: Counter[str], scheduler: Any, iteration: Any) -> None:
    """Add one step of an engine's statistics, under its metrics' names."""
    if scheduler is not None:
        counters["prefix_cache_queries"] += scheduler.prefix_cache_stats.queries
        counters["prefix_cache_hits"] += scheduler.prefix_cache_stats.hits
        external = getattr(scheduler, "connector_prefix_cache_stats", None)
        if external is not None:
            counters["external_prefix_cache_queries"] += external.queries
            counters["external_prefix_cache_hits"] += external.hits
    if iteration is not None:
        counters["prompt_tokens"] += iteration.num_prompt_tokens
        counters["generation_tokens"] += iteration.num_generation_tokens
        counters["num_preemptions"] += iteration.num_preempted_reqs
        counters["request_success"] += len(iteration.finished_requests)


def _signals(scheduler: Any) -> Signals:
    return Signals(
        waiting_requests=scheduler.num_waiting_reqs
        + getattr(scheduler, "num_skipped_waiting_reqs", 0),
        running_requests=scheduler.num_running_reqs,
        kv_usage=scheduler.kv_cache_usage,
    )
