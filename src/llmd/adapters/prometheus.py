"""A server's state for Prometheus, under the pool names of llm-d.

An HPA manifest or a dashboard written for llm-d's inference pool reads the
same names here; what only llmd knows is named `llmd_*`.  Needs the extra
`http`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

import attrs
import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..balancer import Account, Accounts, Bands, Over
from ..live import Server


@attrs.define(eq=False)
class ServerCollector(Collector):
    """Reads a server whenever it is scraped; register it in a registry.

    Attributes:
        server: What to read.
        pool: The value of the label `name`.
    """

    server: Server
    pool: str = "llmd"

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of this moment."""
        yield from self._pool()
        yield from self._workers()
        yield from self._tenants()
        yield from self._bands()
        events = CounterMetricFamily(
            "llmd_events", "What went wrong and was made good", labels=["kind"]
        )
        for kind, count in sorted(self.server.counts.items()):
            events.add_metric([kind], count)
        yield events

    def _pool(self) -> Iterator[Metric]:
        view = self.server.cluster.view
        workers = view.workers
        ready = workers.ready()
        queue = np.fmax(workers.waiting_requests, workers.reported_waiting)[ready]
        booked = workers.context_tokens / np.maximum(workers.kv_tokens, 1)
        usage = np.fmax(booked, workers.reported_kv_usage)[ready]
        for name, what, value in (
            (
                "inference_pool_average_queue_size",
                "Requests waiting for a first token, a ready worker",
                float(queue.mean()) if len(queue) else 0.0,
            ),
            (
                "inference_pool_average_kv_cache_utilization",
                "KV cache in use, mean over ready workers",
                float(usage.mean()) if len(usage) else 0.0,
            ),
            ("inference_pool_ready_pods", "Ready workers", float(ready.sum())),
            (
                "inference_extension_flow_control_queue_size",
                "Requests waiting in llmd for a worker",
                float(len(view.waiting)),
            ),
        ):
            yield _gauge(name, what, {"name": self.pool}, value)
        running = GaugeMetricFamily(
            "inference_objective_running_requests",
            "Requests dispatched and not ended",
            labels=["model_name"],
        )
        for model in sorted(self.server.cluster.models) or [""]:
            rows = [not w.models or model in w.models for w in workers.facts]
            count = workers.running_requests[np.array(rows, dtype=bool)].sum()
            running.add_metric([model], float(count))
        yield running

    def _workers(self) -> Iterator[Metric]:
        workers = self.server.cluster.view.workers
        columns = {
            "llmd_worker_running_requests": workers.running_requests,
            "llmd_worker_waiting_requests": workers.waiting_requests,
            "llmd_worker_prefill_tokens": workers.prefill_tokens,
            "llmd_worker_context_tokens": workers.context_tokens,
        }
        for name, column in columns.items():
            family = GaugeMetricFamily(name, "Booked on a worker", labels=["worker"])
            for worker, value in zip(workers.ids, column.tolist(), strict=True):
                family.add_metric([worker], value)
            yield family
        states = GaugeMetricFamily(
            "llmd_worker_state",
            "1 for the state a worker is in",
            labels=["worker", "state"],
        )
        for worker, state in zip(workers.ids, workers.states, strict=True):
            states.add_metric([worker, state.value], 1.0)
        yield states

    def _tenants(self) -> Iterator[Metric]:
        """Yield what a balancer with accounts knows of tenants."""
        accounts = getattr(self.server.cluster.balancer, "accounts", None)
        if not isinstance(accounts, Accounts):
            return
        yield from _accounts("tenant", accounts.items())
        for short, what, value in (
            ("service_gap", "Service between tenants that wait", accounts.service_gap),
            ("jain_index", "Evenness of served tokens, 1 is even", accounts.jain()),
        ):
            yield _gauge(f"llmd_{short}", what, {"name": self.pool}, value)

    def _bands(self) -> Iterator[Metric]:
        order: object = self.server.cluster.balancer
        while isinstance(order, Over):
            order = order.order
        if isinstance(order, Bands):
            yield from _accounts("band", [(b.name, b.account) for b in order.of])


def _accounts(
    kind: str, accounts: Iterable[tuple[Hashable, Account]]
) -> Iterator[Metric]:
    """Yield the figures of each tenant, or whatever *kind* says."""
    waiting = GaugeMetricFamily(
        f"llmd_{kind}_waiting_requests", "Waiting in llmd", labels=[kind]
    )
    served = CounterMetricFamily(
        f"llmd_{kind}_served_tokens", f"Given to a {kind}", labels=[kind, "kind"]
    )
    waits = GaugeMetricFamily(
        f"llmd_{kind}_wait_seconds",
        "From arrival to dispatch, a quantile of all so far",
        labels=[kind, "quantile"],
    )
    for each, account in accounts:
        name = str(each)
        waiting.add_metric([name], account.waiting)
        served.add_metric([name, "prompt"], account.prompt_tokens)
        served.add_metric([name, "output"], account.output_tokens)
        for part in (0.5, 0.99):
            waits.add_metric([name, str(part)], account.waits.quantile(part))
    yield from (waiting, served, waits)


def _gauge(name: str, what: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, what, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
