"""Measure a P/D hand-off between two vLLM engines, over llmd's transport.

    PYTHONPATH=src python benchmarks/gpu/handoff.py [--connector NAME] [--through-host]
        [--visible 0,1 1,0]

Both on one GPU, or where `--visible` says: the GPUs that each sees, its own first.
A 7B shape (Qwen2.5) with random weights.  For each length: prefill on one engine,
then the same prompt on the other with the KV handed over, then once more on the
first, where it is a prefix hit.  `beyond_ms` is how much later the second engine's
first token comes than a prefix hit would: what the hand-off costs.  Tokens must be
those of the first engine.  The last line printed is the result as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time

LENGTHS = (512, 2048, 8192, 16384, 32000)
ROUNDS = 3
SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "use_sliding_window": False,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "use_cache": True,
}


def model_directory():
    directory = os.path.join(tempfile.gettempdir(), "llmd-qwen7b-shape")
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "config.json"), "w") as file:
        json.dump(SHAPE, file)
    return directory


def start(
    role, port, connector, staging_bytes, checksums, through_host=False, visible=""
):
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(port)
    if visible:  # to the engine, which is a process of its own
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    if connector == "LlmdConnector":
        from llmd.adapters.vllm.connector_config import transfer_config

        config = transfer_config(
            role=role,
            staging_bytes=staging_bytes,
            checksums=checksums,
            through_host=through_host,
        )
    else:
        config = {"kv_connector": connector, "kv_role": "kv_both"}
    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model_directory(),
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            gpu_memory_utilization=0.36,
            max_model_len=32768,
            max_num_seqs=64,
            kv_transfer_config=KVTransferConfig(**config),
        )
    )


class Asked:
    """Asks engines for tokens and times the first."""

    def __init__(self):
        self.count = 0

    async def __call__(self, engine, ids, tokens, transfer=None):
        from vllm.inputs import TokensPrompt

        from vllm import SamplingParams

        self.count += 1
        params = SamplingParams(
            max_tokens=tokens,
            ignore_eos=True,
            temperature=0.0,
            detokenize=False,
            extra_args={"kv_transfer_params": transfer} if transfer else None,
        )
        begun, first, last = time.perf_counter(), None, None
        async with asyncio.timeout(60):
            prompt = TokensPrompt(prompt_token_ids=ids)
            async for piece in engine.generate(prompt, params, f"r{self.count}"):
                first, last = first or time.perf_counter() - begun, piece
        return first, list(last.outputs[0].token_ids), last.kv_transfer_params


FOR_ANOTHER = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


async def one(ask, prefill, decode, ids):
    cold, _, transfer = await ask(prefill, ids, 1, FOR_ANOTHER)
    handed, tokens, _ = await ask(decode, ids, 8, transfer)
    warm, wanted, _ = await ask(prefill, ids, 8)
    return {
        "prefill_ms": 1e3 * cold,
        "handed_ms": 1e3 * handed,
        "hit_ms": 1e3 * warm,
        "beyond_ms": 1e3 * (handed - warm),
        "same": tokens == wanted,
        "handed_over": transfer is not None,
    }


async def measure(options):
    staging = int(options.staging_gb * (1 << 30))
    begun = time.perf_counter()
    engines = [
        start(
            role,
            port,
            options.connector,
            staging,
            not options.unchecked,
            options.through_host,
            visible,
        )
        for role, port, visible in zip(
            ("kv_producer", "kv_consumer"), (5700, 5800), options.visible, strict=True
        )
    ]
    print("engines up after", round(time.perf_counter() - begun, 1), "s", flush=True)
    prefill, decode = engines
    rng, ask, rows = random.Random(2), Asked(), []

    def prompt(tokens):
        return [rng.randrange(1000, 150000) for _ in range(tokens)]

    for tokens in (512, 8192):
        await one(ask, prefill, decode, prompt(tokens))
    for tokens in LENGTHS:
        for _ in range(ROUNDS):
            try:
                row = await one(ask, prefill, decode, prompt(tokens))
            except Exception as error:
                row = {"error": repr(error)[:500]}
            rows.append({"tokens": tokens, "kv_mb": tokens * 57344 / 1e6, **row})
            print(json.dumps(rows[-1]), flush=True)
    for engine in engines:
        engine.shutdown()
    return rows


def set_environment():
    """Say what both engines need to start here, unless it is said already."""
    for name, value in (
        ("VLLM_USE_FLASHINFER_SAMPLER", "0"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("HF_HUB_OFFLINE", "1"),
        ("VLLM_NIXL_SIDE_CHANNEL_HOST", "127.0.0.1"),
        ("LLMD_KV_KEY", "one machine, one run, no secret at all"),
    ):
        os.environ.setdefault(name, value)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--connector", default="LlmdConnector")
    parser.add_argument("--staging-gb", type=float, default=4.0)
    parser.add_argument("--unchecked", action="store_true")
    parser.add_argument("--through-host", action="store_true")
    parser.add_argument("--visible", nargs=2, default=("", ""), metavar="GPUS")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args()
    set_environment()
    rows = asyncio.run(measure(options))
    result = {"connector": options.connector, "visible": options.visible, "rows": rows}
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
