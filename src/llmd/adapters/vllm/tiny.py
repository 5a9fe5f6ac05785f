"""A tiny model, made here without a download, for demos and tests.

`python -m llmd.adapters.vllm.tiny OUT [--seed N]` makes a Qwen3 model of two
layers with random weights (1.7 MB) and, unless told not to, a byte-level
tokenizer with a chat template.  Weights are saved, not left to the engine's
dummy loader, so that every process loads the same ones and wrong KV shows up
as wrong tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

_SPECIAL = ("<|pad|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
_DONE = ".llmd-tiny.json"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    tokenizer: bool = True,
    vocabulary: int = 512,
    max_tokens: int = 4096,
) -> Path:
    """Make a model in *directory*, or leave it if it is there already.

    Needs torch and transformers, which come with vLLM.  It appears whole or
    not at all, so processes may race for it.

    Args:
        directory: Where; made if missing.
        seed: Of the weights: models of two seeds answer differently.
        tokenizer: Give it a tokenizer; without one, prompts are token ids.
        vocabulary: Token ids, at least 260.
        max_tokens: Prompt and output together.

    Raises:
        FileExistsError: Something else is there.
    """
    target = Path(directory).absolute()
    made = {
        "seed": seed,
        "tokenizer": tokenizer,
        "vocabulary": vocabulary,
        "max_tokens": max_tokens,
    }
    if _is_there(target, made):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        model = Path(scratch) / "model"
        model.mkdir()
        _write_json(model / "config.json", _config(vocabulary, max_tokens))
        _save_weights(model, seed)
        if tokenizer:
            _save_tokenizer(model, vocabulary, max_tokens)
        _write_json(model / _DONE, made)
        try:
            model.rename(target)
        except OSError:
            if not _is_there(target, made):
                raise
    return target


def _is_there(target: Path, made: dict[str, Any]) -> bool:
    if not target.exists():
        return False
    if not any(target.iterdir()):
        shutil.rmtree(target)
        return False
    try:
        found = json.loads((target / _DONE).read_text())
    except (OSError, ValueError):
        found = None
    if found != made:
        raise FileExistsError(f"{target} holds something else: {found}")
    return True


def _config(vocabulary: int, max_tokens: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": max_tokens,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }


def _save_weights(model: Path, seed: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(model)
        weights = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights.save_pretrained(model, safe_serialization=True)


def _save_tokenizer(model: Path, vocabulary: int, max_tokens: int) -> None:
    """Save a tokenizer of 256 bytes, without merges; every id decodes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*_SPECIAL, *alphabet]
    words += [f"w{index}" for index in range(vocabulary - len(words))]
    ids = {word: index for index, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocab=ids, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in _SPECIAL]
    )
    made.save(str(model / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|pad|>",
        "eos_token": "<|eos|>",
        "chat_template": _CHAT_TEMPLATE,
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(model / "tokenizer_config.json", settings)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))


def main() -> None:
    """Make the model that the command line asks for."""
    parser = argparse.ArgumentParser(description="Make a tiny model.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-tokenizer", dest="tokenizer", action="store_false")
    wanted = parser.parse_args()
    print(make_model(wanted.out, seed=wanted.seed, tokenizer=wanted.tokenizer))


if __name__ == "__main__":
    main()
