"""Latencies and outcomes of the requests that came by HTTP, for `/metrics`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator

import attrs
from prometheus_client import CollectorRegistry, Counter, Histogram

from ...live import Output
from ...types import Request
from .names import Names

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


def _histogram(name: str, what: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(name, what, ["model_name"], buckets=_SECONDS, registry=registry)


@attrs.define(eq=False)
class Observer:
    """Measures each request from its arrival at the edge to its end.

    Attributes:
        names: Tells which names may be labels.
        registry: Where the measures are kept.
    """

    names: Names
    registry: CollectorRegistry = attrs.field(factory=CollectorRegistry)
    _ttft: Histogram = attrs.field(init=False)
    _e2e: Histogram = attrs.field(init=False)
    _total: Counter = attrs.field(init=False)
    _tokens: Counter = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._ttft = _histogram(
            "llmd_time_to_first_token_seconds",
            "From arrival at the edge to the first token",
            self.registry,
        )
        self._e2e = _histogram(
            "inference_objective_request_duration_seconds",
            "From arrival at the edge to the end",
            self.registry,
        )
        self._total = Counter(
            "inference_objective_request_total",
            "Requests by how they ended",
            ["model_name", "outcome"],
            registry=self.registry,
        )
        self._tokens = Counter(
            "llmd_tokens_total",
            "Tokens by kind: prompt, cached, generated",
            ["model_name", "kind"],
            registry=self.registry,
        )

    @contextlib.contextmanager
    def request(self, request: Request) -> Iterator[Callable[[Output], None]]:
        """Measure one request; call what this yields with every piece."""
        begun, first = time.monotonic(), True
        model = self.names.label(request)

        def seen(output: Output) -> None:
            nonlocal first
            tokens = len(output.token_ids)
            if first and tokens:
                first = False
                self._ttft.labels(model).observe(time.monotonic() - begun)
                self._tokens.labels(model, "prompt").inc(request.prompt_tokens)
                self._tokens.labels(model, "cached").inc(output.cached_tokens or 0)
            self._tokens.labels(model, "generated").inc(tokens)

        outcome = "ok"
        try:
            yield seen
        except (GeneratorExit, asyncio.CancelledError):
            outcome = "cancelled"
            raise
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            self._e2e.labels(model).observe(time.monotonic() - begun)
            self._total.labels(model, outcome).inc()
