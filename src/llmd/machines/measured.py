"""What was measured, as steps that a machine can be fitted to."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs

from .fit import Step

_BLOCK_TOKENS = 16
_H200_PROMPTS = (
    # prompt tokens, cold milliseconds, then the same prompt again
    (128, 21.5, 18.0),
    (512, 19.0, 18.0),
    (1024, 25.0, 19.0),
    (2048, 46.0, 20.0),
    (4096, 93.5, 25.0),
    (8192, 198.0, 31.0),
    (16384, 445.0, 29.0),
    (32000, 1061.5, 35.0),
)
_H200_DECODE = (
    # requests, milliseconds an output token with CUDA graphs
    (1, 4.85),
    (4, 4.91),
    (16, 5.10),
    (64, 5.59),
    (128, 6.56),
    (256, 10.0),
)
_DECODE_CONTEXT = 512 + 128 / 2


def h200_qwen25_7b() -> tuple[Step, ...]:
    """Steps of a Qwen2.5 7B shape, bf16, random weights, on one NVIDIA H200.

    Measured 24 November 2026, vLLM 0.26.0, torch 2.11, blocks of 16 tokens,
    chunks of 2048; CUDA graphs for decode only.  Where several runs differed,
    the middle of their range.  Prompts: one request at a time, time to first
    token, cold and again with its prefix cached.  Decode: 512-token prompts,
    128 new tokens, mean time an output token.
    """
    cold = [Step(tokens, 0, 0, 0, ms / 1e3) for tokens, ms, _ in _H200_PROMPTS]
    again = []
    for tokens, _, ms in _H200_PROMPTS:
        cached = (tokens - 1) // _BLOCK_TOKENS * _BLOCK_TOKENS
        again.append(Step(tokens - cached, cached, 0, 0, ms / 1e3))
    decode = [
        Step(0, 0, requests, requests * _DECODE_CONTEXT, ms / 1e3)
        for requests, ms in _H200_DECODE
    ]
    return (*cold, *again, *decode)


@attrs.frozen(kw_only=True)
class H200SleepWake:
    """Sleep level 1 of the same engine on the same H200, same day.

    Attributes:
        weights_bytes: Moved to pinned memory of the host.
        first_sleep_s: Pins that memory.
        sleep_s: Every later one.
        wake_s: Mapping and copying back, without the first request.
        copy_bytes_per_s: Of pinned copies, each way.
    """

    weights_bytes: float = 14.5 * (1 << 30)
    first_sleep_s: float = 18.0
    sleep_s: float = 0.375
    wake_s: float = 0.725
    copy_bytes_per_s: float = 55e9


def read_aic(path: str | Path) -> Mapping[str, tuple[Step, ...]]:
    """Read steps by model from a table of the AIC kind.

    Columns: model, kind, batch, ctx_tokens, isl_or_kvlen, prefix, latency_ms.
    The times are sums of kernels measured on an H200 with vLLM 0.24
    (aiconfigurator-core 0.12.0, Apache-2.0), without CPU or HTTP time.
    """
    steps: dict[str, list[Step]] = {}
    for model, step in _aic_rows(Path(path)):
        steps.setdefault(model, []).append(step)
    return {model: tuple(found) for model, found in steps.items()}


def _aic_rows(path: Path) -> Iterator[tuple[str, Step]]:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    with io.StringIO(text) as file:
        for row in csv.DictReader(file):
            requests, length = int(row["batch"]), int(row["isl_or_kvlen"])
            tokens, seconds = int(row["ctx_tokens"]), float(row["latency_ms"]) / 1e3
            kind = row["kind"]
            if kind == "decode":
                step = Step(0, 0, requests, requests * length, seconds)
            elif kind == "prefill_prefixhit":
                step = Step(tokens, int(row["prefix"]), 0, 0, seconds)
            else:
                # Prompts of one length: together they look at less than one
                # prompt of all their tokens does.
                ahead = (min(length, tokens) - tokens) / 2
                decoding = requests if kind == "mixed" else 0
                step = Step(tokens, ahead, decoding, decoding * length, seconds)
            yield row["model"], step
