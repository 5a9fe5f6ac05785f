"""Print how well the step model fits what was measured: docs/machines.md.

python benchmarks/machines.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmd.machines import (
    H200,
    PROFILES,
    Machine,
    Step,
    break_even_tokens,
    errors,
    fit_from_probe,
    tier_credit,
)
from llmd.machines.fit import PARAMETERS
from llmd.machines.measured import h200_qwen25_7b, read_aic
from llmd.machines.shape import LLAMA31_8B, QWEN3_06B, QWEN3_8B, QWEN25_7B
from llmd.types import Tier

TABLE = "tests/data/aic_h200_vllm0240_small_models.csv.gz"
SHAPES = {
    "meta-llama/Meta-Llama-3.1-8B": LLAMA31_8B,
    "Qwen/Qwen3-8B": QWEN3_8B,
    "Qwen/Qwen3-0.6B": QWEN3_06B,
}


def table_fits() -> None:
    print(
        "# Table of vLLM 0.24 kernels on an H200: two thirds fitted, one third held out"
    )
    print("| model | roofline, nothing fitted | held out | held out, by kind |")
    print("|---|---|---|---|")
    for model, steps in read_aic(Path(__file__).parents[1] / TABLE).items():
        drawn = np.random.default_rng(1).random(len(steps)) < 1 / 3
        kept = [step for step, out in zip(steps, drawn, strict=True) if not out]
        out = [step for step, out in zip(steps, drawn, strict=True) if out]
        start = Machine.of(H200, SHAPES[model])
        fitted = fit_from_probe(kept, start)
        kinds = ", ".join(
            f"{kind} {errors(fitted, of_kind(out, kind)).median:.1%}"
            for kind in ("prompt", "prefix hit", "mixed", "decode")
        )
        print(f"| {model} | {errors(start, steps)} | {errors(fitted, out)} | {kinds} |")


def efficiencies() -> None:
    """Show where the defaults of `llmd.machines.Efficiency` come from."""
    print("\n# Part of the published peak that each fit reaches")
    print("| model | compute | attention | memory | floor, ms |")
    print("|---|---|---|---|---|")
    for model, steps in read_aic(Path(__file__).parents[1] / TABLE).items():
        shape = SHAPES[model]
        fit = fit_from_probe(steps, Machine.of(H200, shape))
        flops, rate = H200.bf16_flops_per_s, H200.memory_bytes_per_s
        compute = 2 * shape.layer_weights / flops / fit.prefill_s_per_token
        attention = shape.attention_flops / flops / fit.attention_s_per_token2
        memory = shape.kv_bytes_per_token / rate / fit.decode_s_per_context_token
        floors = f"{fit.decode_floor_s * 1e3:.2f}/{fit.prefill_floor_s * 1e3:.2f}"
        print(
            f"| {model} | {compute:.2f} | {attention:.2f} | {memory:.2f} | {floors} |"
        )


def of_kind(steps: list[Step], kind: str) -> list[Step]:
    return [step for step in steps if kind_of(step) == kind]


def kind_of(step: Step) -> str:
    if not step.prefill_tokens:
        return "decode"
    if step.decode_requests:
        return "mixed"
    return "prefix hit" if step.prefill_context > 0 else "prompt"


def own_fit() -> None:
    steps = h200_qwen25_7b()
    fitted = fit_from_probe(steps)
    print("\n# Qwen2.5 7B shape, H200, vLLM 0.26, measured end to end")
    print("all 22 steps fitted:", errors(fitted, steps))
    left = [
        errors(fit_from_probe(steps[:row] + steps[row + 1 :]), [steps[row]]).worst
        for row in range(len(steps))
    ]
    print(
        f"each left out in turn: median {np.median(left):.1%},"
        f" p90 {np.quantile(left, 0.9):.1%}, worst {max(left):.1%}"
    )
    for name in (*PARAMETERS, "knee"):
        print(f"  {name} = {getattr(fitted, name):.4g}")


def worth() -> None:
    print("\n# What a cached token of a 7B model is worth (1024 tokens), predicted")
    print("| hardware | CPU | disk | remote | fetch over 50 GB/s from, tokens |")
    print("|---|---|---|---|---|")
    for hardware in PROFILES.values():
        machine = Machine.of(hardware, QWEN25_7B)
        credits = " | ".join(
            f"{tier_credit(machine, tier):.2f}" for tier in list(Tier)[1:]
        )
        tokens = break_even_tokens(machine, 50e9, remote_queue_s=0.1)
        print(f"| {hardware.name} | {credits} | {tokens} |")


if __name__ == "__main__":
    table_fits()
    efficiencies()
    own_fit()
    worth()
