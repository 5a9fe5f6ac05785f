"""The rules of other systems, as published, to compare with.

Each is the rule alone, fed from the cluster's own books and index: what differs
between two of them is then the rule and not the freshness of its signals.  Where
a rule reads an engine's metric that the books know better, the docstring says
so.  None of these is recommended.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import numpy as np

from ..decision import Term
from ..types import Request, Tier
from ..view import Floats, Mask, View
from .blend import Blend, KVHeadroom, PrefixOverlap, QueueDepth, Score
from .interface import Router, TermRouter


def llm_d() -> Blend:
    """Return llm-d's default profile: prefix 3, KV cache 2, queue 2.

    llm-d, guides/precise-prefix-cache-aware and the default scheduling profile:
    prefix-cache-scorer 3, kv-cache-utilization-scorer 2, queue-scorer 2, each in
    [0, 1], summed, the highest picked.

    >>> llm_d()
    3 * PrefixOverlap() + 2 * KVHeadroom() + 2 * QueueDepth()
    """
    return 3 * PrefixOverlap() + 2 * KVHeadroom() + 2 * QueueDepth()


@attrs.frozen
class TokenLoad(Score):
    """How few tokens are in flight at a worker.

    llm-d-router, scorer/tokenload/README.md: 1 - min(1, tokens / threshold).

    >>> TokenLoad().threshold_tokens
    4194304
    """

    threshold_tokens: int = 4_194_304
    unit = "tokens"

    def signal(self, request: Request, view: View) -> Floats:
        return view.workers.context_tokens.astype(np.float64)

    def rate(self, signal: Floats) -> Floats:
        return 1.0 - np.minimum(1.0, signal / self.threshold_tokens)


@attrs.define
class LlmdAffinity(TermRouter):
    """llm-d-router's newer default: stick to who holds the prompt, unless slow.

    filter/prefixcacheaffinity/plugin.go: workers holding *affinity* of the
    prompt's full blocks are sticky; with some sticky, only they stay, unless the
    best of them is *max_penalty_s* slower than the best of the others, slowness
    being tokens in flight / *peak_tokens_per_s*.  Among those that stay the
    token-load scorer decides.  A share *explore* of requests skips the filter.

    >>> LlmdAffinity().affinity
    0.8
    """

    affinity: float = 0.8
    max_penalty_s: float = 18.0
    peak_tokens_per_s: float = 15_928.0
    explore: float = 0.0
    load: TokenLoad = attrs.field(factory=TokenLoad)

    def terms(self, request: Request, view: View) -> tuple[Term, ...]:
        tokens = self.load.signal(request, view)
        held = self._held(request, view)
        kept = self._kept(held, tokens / self.peak_tokens_per_s, view)
        gate = np.where(kept, 0.0, np.inf)
        score = self.load.rate(tokens)
        return (
            Term("affinity", held, "of blocks", gate),
            Term("token load", tokens, "tokens", score, -1.0),
        )

    def _held(self, request: Request, view: View) -> Floats:
        size = view.workers.block_tokens
        blocks = request.prompt_tokens // size
        held = view.cached_tokens(request)[:, Tier.GPU] // size
        return np.where(blocks > 0, held / np.maximum(blocks, 1), 0.0)

    def _kept(self, held: Floats, slowness_s: Floats, view: View) -> Mask:
        everyone: Mask = np.ones(len(held), dtype=np.bool_)
        if len(held) <= 1 or self.affinity <= 0:
            return everyone
        if self.explore and view.rng.random() < self.explore:
            return everyone
        sticky: Mask = held >= self.affinity
        if not sticky.any():
            return everyone
        if self.max_penalty_s > 0 and not sticky.all():
            penalty = slowness_s[sticky].min() - slowness_s[~sticky].min()
            if penalty > self.max_penalty_s:
                return everyone
        return sticky


@attrs.define
class DynamoBlocks(TermRouter):
    """Dynamo's cost in blocks: what is to be prefilled and what is being decoded.

    lib/kv-router/src/scheduling/selector/default.rs, `worker_logit`:

        prefill = max(0, prefill blocks there and of this request - credit)
        credit  = overlap_credit * decay * GPU blocks + host * CPU + disk * DISK
        decay   = 1 / (1 + credit_decay * excess prefill blocks / own blocks)
        cost    = load_scale * prefill + decode blocks
                  + active_request_weight * requests

    with the defaults of KvRouterConfig 1.6.1.  Blocks of a slower tier count
    where no faster one has them; the blocks this request would add count as
    decode blocks, as its `potential_blocks` do.

    >>> DynamoBlocks().host_weight
    0.75
    """

    overlap_credit: float = 1.0
    credit_decay: float = 0.0
    load_scale: float = 1.0
    host_weight: float = 0.75
    disk_weight: float = 0.25
    active_request_weight: float = 0.0

    def terms(self, request: Request, view: View) -> tuple[Term, ...]:
        workers = view.workers
        size = workers.block_tokens
        held = view.cached_tokens(request) // size[:, None]
        device = held[:, Tier.GPU]
        host = held[:, Tier.CPU] - device
        disk = held[:, Tier.DISK] - held[:, Tier.CPU]
        queued = workers.prefill_tokens
        own = request.prompt_tokens / size
        excess = (queued - (queued.min() if len(queued) else 0)) / size / own
        decay = 1.0 / (1.0 + self.credit_decay * excess)
        credit = (
            self.overlap_credit * decay * device
            + self.host_weight * host
            + self.disk_weight * disk
        )
        raw = queued / size + own
        prefill = np.maximum(raw - credit, 0.0)
        blocks = (workers.context_tokens + request.prompt_tokens) / size
        running = workers.running_requests.astype(np.float64)
        weight = self.active_request_weight
        return (
            Term("prefill", raw, "blocks", prefill, self.load_scale),
            Term("decode", blocks, "blocks", blocks),
            Term("requests", running, "requests", running, weight),
        )


class VllmKVAware(Router):
    """vLLM Router's kv_aware: who holds most; if nobody does, the least loaded.

    vllm-project/router, src/policies/kv_aware.rs, `select_with_scoring`.  Among
    equals the first counts there (`max_by_key` takes the last); here ties are
    drawn.

    >>> VllmKVAware()
    VllmKVAware()
    """

    def cost(self, request: Request, view: View) -> Floats:
        held = view.cached_tokens(request)[:, Tier.GPU]
        if held.any():
            return -held.astype(np.float64)
        return view.workers.running_requests.astype(np.float64)

    def __repr__(self) -> str:
        return "VllmKVAware()"


@attrs.define
class SglangCacheAware(Router):
    """SGLang's cache_aware: the longest match while loads are balanced.

    sgl-model-gateway/src/policies/cache_aware.rs: imbalanced means
    max - min > *balance_abs* and max > *balance_rel* * min, in requests; then
    the shortest queue.  Balanced: the worker of the longest match if it is more
    than *cache_threshold* of the prompt, else the least loaded.  The defaults
    are those of its command line.

    >>> SglangCacheAware().cache_threshold
    0.3
    """

    cache_threshold: float = 0.3
    balance_abs: int = 64
    balance_rel: float = 1.5

    def cost(self, request: Request, view: View) -> Floats:
        load = view.workers.running_requests.astype(np.float64)
        if not len(load):
            return load
        low, high = load.min(), load.max()
        if high - low > self.balance_abs and high > self.balance_rel * low:
            return load
        held = view.cached_tokens(request)[:, Tier.GPU]
        if held.max() / request.prompt_tokens > self.cache_threshold:
            return -held.astype(np.float64)
        return load


@attrs.define
class AibrixPrefix(Router):
    """AIBrix's prefix-cache: the best match among workers of ordinary load.

    pkg/plugins/gateway/algorithms/prefix_cache.go: of those that match, in order
    of match and then of load, the first whose requests are at most mean +
    *deviations* * standard deviation; without one, the least loaded.  If the
    busiest has more than *gate_ratio* * (mean + 1) and is *gate_gap* above the
    least loaded, only the least loaded may match.  Two deviations was its
    default for long; newer versions have one.

    >>> AibrixPrefix().deviations
    2.0
    """

    deviations: float = 2.0
    gate_ratio: float = 2.0
    gate_gap: int = 8

    def cost(self, request: Request, view: View) -> Floats:
        load = view.workers.running_requests.astype(np.float64)
        if not len(load):
            return load
        held = view.cached_tokens(request)[:, Tier.GPU].astype(np.float64)
        low, high, mean = load.min(), load.max(), load.mean()
        able = held > 0
        if high > self.gate_ratio * (mean + 1) and high - low >= self.gate_gap:
            able &= load == low
        able &= load <= mean + self.deviations * load.std()
        if not able.any():
            return load
        # By match first; load only breaks ties, and is below 1 here.
        return np.where(able, load / (high + 1) - held, np.inf)


RIVALS: dict[str, Callable[[], Router]] = {
    "llm-d 3/2/2": llm_d,
    "llm-d affinity": LlmdAffinity,
    "dynamo blocks": DynamoBlocks,
    "vllm kv_aware": VllmKVAware,
    "sglang cache_aware": SglangCacheAware,
    "aibrix prefix": AibrixPrefix,
}
"""How to make each, by name."""
