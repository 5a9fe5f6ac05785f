"""Models, engines and workloads of `fidelity.py`: a small site and a large one."""

from __future__ import annotations

from typing import Any

import attrs

from llmd.adapters.vllm.probe_sizes import Sizes
from llmd.sim import Workload, workloads


@attrs.frozen(kw_only=True)
class Site:
    """What runs where.

    Attributes:
        shape: Of the model, for its config.json.
        options: Of each engine.
        sizes: Of the probe, which takes some thirty seconds.
        scale: Of the workloads' lengths.
        requests: Of each workload, at least.
    """

    shape: dict[str, Any]
    options: dict[str, Any]
    sizes: Sizes
    scale: float
    requests: int

    def workload(self, name: str, rate: float, requests: int) -> Workload:
        """Make one of the four kinds."""
        size = self.scale
        common: dict[str, Any] = {"rate": rate, "requests": requests, "seed": 11}

        def of(tokens: float) -> int:
            return max(int(tokens * size), 8)

        if name == "dialogue":
            return workloads.dialogue(
                turns=4.0,
                system_tokens=of(400),
                question_tokens=of(60),
                answer_tokens=of(180),
                think_s=2.0,
                **common,
            )
        if name == "documents":
            return workloads.documents(
                document_tokens=of(2400),
                question_tokens=of(60),
                answer_tokens=of(100),
                **common,
            )
        if name == "batch":
            return workloads.batch(
                prompt_tokens=of(400), answer_tokens=of(240), **common
            )
        return workloads.shared_prefix(
            groups=12,
            users_per_group=4,
            system_tokens=of(1600),
            question_tokens=of(160),
            answer_tokens=of(160),
            **common,
        )


def _shape(hidden: int, layers: int, heads: int, kv_heads: int, **more: int) -> dict:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_sliding_window": False,
        "max_position_embeddings": 32_768,
        **more,
    }


CPU = Site(
    # Deep and narrow: its steps are long beside what the client does for each token,
    # which takes the same cores, and fit into caches, as the cores share the memory.
    shape=_shape(128, 96, 4, 1, intermediate_size=352, vocab_size=2048),
    options={
        "max_model_len": 4096,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 288 << 20,
    },
    sizes=Sizes(
        vocabulary=2048,
        step_tokens=512,
        longest=4096,
        shared=True,
        rest_s=0.0,
        prompts=(16, 48, 128, 256, 384, 500),
        joining=(16, 128, 384),
        contexts=(0, 512, 1536),
        cached=6144,
        batches=(1, 2, 4, 8, 12, 16),
        answer=12,
    ),
    scale=0.25,
    requests=200,
)
GPU = Site(
    shape={
        **_shape(3584, 28, 28, 4, intermediate_size=18_944, vocab_size=152_064),
        "torch_dtype": "bfloat16",
    },
    options={
        "max_model_len": 16_384,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 128,
        "kv_cache_memory_bytes": 24 << 30,
        "gpu_memory_utilization": 0.6,
        # By default steps of more than 256 tokens are no graphs: as slow as the host
        # launches kernels, which differs with its start and what else it does.
        "compilation_config": {"max_cudagraph_capture_size": 2048},
    },
    sizes=Sizes(
        vocabulary=152_064,
        step_tokens=2048,
        longest=16_384,
        shared=False,
        rest_s=0.15,
        prompts=(64, 256, 512, 1024, 1536, 2000),
        # Shorter ones the host has not launched when the step before has ended.
        joining=(1024, 1536, 2000),
        contexts=(0, 2048, 8192),
        cached=140_000,
        batches=(1, 4, 16, 32, 64, 128),
        answer=30,
    ),
    scale=1.0,
    requests=40,
)
