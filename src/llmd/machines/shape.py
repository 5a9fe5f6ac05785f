"""How large a model is, as far as time and memory depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from ..errors import InvalidHardware


@attrs.frozen(kw_only=True)
class Shape:
    """A dense decoder-only transformer with grouped-query attention.

    Attributes:
        name: Of the model.
        layers: Of the decoder.
        hidden: Width of the residual stream.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        intermediate: Width of the gated feed-forward layer.
        vocabulary: Tokens.
        tied: Input and output embeddings are one matrix.
        weight_bytes: Of one weight.
        kv_element_bytes: Of one number of the KV cache.

    >>> QWEN25_7B.kv_bytes_per_token
    57344.0
    >>> round(QWEN25_7B.weights_bytes / 2**30, 1)  # as vLLM reports it
    14.2
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    weight_bytes: float = 2.0
    kv_element_bytes: float = 2.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "") -> Shape:
        """Read a Hugging Face `config.json` of a dense model.

        Raises:
            InvalidHardware: A field that a dense decoder has is missing.
        """
        try:
            heads = int(config["num_attention_heads"])
            hidden = int(config["hidden_size"])
            return cls(
                name=name or str(config.get("_name_or_path", "")),
                layers=int(config["num_hidden_layers"]),
                hidden=hidden,
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                intermediate=int(config["intermediate_size"]),
                vocabulary=int(config["vocab_size"]),
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except KeyError as missing:
            raise InvalidHardware(f"the model's config has no {missing}") from missing

    @property
    def layer_weights(self) -> float:
        """Weights of all layers, embeddings not counted."""
        attention = 2.0 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3.0 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> float:
        """Weights of the output matrix."""
        return float(self.vocabulary * self.hidden)

    @property
    def weights_bytes(self) -> float:
        """Memory of all weights."""
        embeddings = self.head_weights * (1 if self.tied else 2)
        return (self.layer_weights + embeddings) * self.weight_bytes

    @property
    def kv_bytes_per_token(self) -> float:
        """Memory of one token's keys and values, all layers."""
        width = self.kv_heads * self.head_dim
        return 2.0 * self.layers * width * self.kv_element_bytes

    @property
    def attention_flops(self) -> float:
        """Operations for one token to look at one other, all layers."""
        return 4.0 * self.layers * self.heads * self.head_dim


QWEN25_7B = Shape(
    name="qwen2.5-7b",
    layers=28,
    hidden=3584,
    heads=28,
    kv_heads=4,
    head_dim=128,
    intermediate=18944,
    vocabulary=152064,
)
LLAMA31_8B = Shape(
    name="llama-3.1-8b",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=14336,
    vocabulary=128256,
)
QWEN3_8B = Shape(
    name="qwen3-8b",
    layers=36,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=12288,
    vocabulary=151936,
)
QWEN3_06B = Shape(
    name="qwen3-0.6b",
    layers=28,
    hidden=1024,
    heads=16,
    kv_heads=8,
    head_dim=128,
    intermediate=3072,
    vocabulary=151936,
    tied=True,
)
