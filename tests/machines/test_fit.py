"""Fitted machines predict steps they were not fitted to."""

from pathlib import Path

import attrs
import numpy as np
import pytest

from llmd.errors import InvalidHardware
from llmd.machines import H200, Machine, Step, errors, fit_from_probe, merged_context
from llmd.machines.fit import PARAMETERS
from llmd.machines.measured import h200_qwen25_7b, read_aic
from llmd.machines.shape import LLAMA31_8B, QWEN3_06B, QWEN3_8B

DATA = Path(__file__).parents[1] / "data"
TABLE = DATA / "aic_h200_vllm0240_small_models.csv.gz"
SHAPES = {
    "meta-llama/Meta-Llama-3.1-8B": LLAMA31_8B,
    "Qwen/Qwen3-0.6B": QWEN3_06B,
    "Qwen/Qwen3-8B": QWEN3_8B,
}


def held_out(steps):
    """Split off a third, drawn by a fixed seed."""
    drawn = np.random.default_rng(1).random(len(steps)) < 1 / 3
    kept = [step for step, out in zip(steps, drawn, strict=True) if not out]
    return kept, [step for step, out in zip(steps, drawn, strict=True) if out]


@pytest.mark.parametrize("model", SHAPES)
def test_held_out_steps_of_a_table(model):
    steps = read_aic(TABLE)[model]
    assert len(steps) == 228
    kept, out = held_out(steps)
    found = errors(fit_from_probe(kept, Machine.of(H200, SHAPES[model])), out)
    assert found.median <= 0.05, found
    assert found.p90 <= 0.15, found


def test_the_default_is_the_fit_of_the_measured_h200():
    fitted, default = fit_from_probe(h200_qwen25_7b()), Machine()
    for name in (*PARAMETERS, "knee"):
        assert getattr(default, name) == pytest.approx(getattr(fitted, name), rel=1e-3)


def test_held_out_steps_of_the_measured_h200():
    steps = h200_qwen25_7b()
    # Inner points: a fit is asked within what it has seen.
    inner = [2, 4, 6, 10, 12, 14, 17, 19]
    kept = [step for row, step in enumerate(steps) if row not in inner]
    found = errors(fit_from_probe(kept), [steps[row] for row in inner])
    assert found.median <= 0.05, found
    assert found.p90 <= 0.15, found


@pytest.mark.parametrize("graph_tokens", [0.0, 300.0])
def test_a_fit_finds_the_machine_that_made_the_probe(graph_tokens):
    made = attrs.evolve(
        Machine.of(H200, LLAMA31_8B),
        prefix_s_per_token=1e-7,
        prefill_floor_s=18e-3,
        graph_tokens=graph_tokens,
        graph_floor_s=6e-3,
    )
    sizes = [
        *((tokens, ahead, 0, 0) for tokens in (16, 256, 2048) for ahead in (0, 9000)),
        *((0, 0, n, n * c) for n in (1, 16, 256) for c in (100, 4000)),
        *((512, 100, n, n * 500) for n in (4, 64)),
    ]
    steps = [Step(*size, made.step_s(*size)) for size in sizes]
    fitted = fit_from_probe(steps, Machine(graph_tokens=graph_tokens))
    assert errors(fitted, steps).worst < 0.001
    assert fitted.step_s(1000, 50, 30, 9000) == pytest.approx(
        made.step_s(1000, 50, 30, 9000), rel=0.01
    )


def test_a_fit_tells_the_host_from_a_gpu_that_is_hot():
    made = attrs.evolve(
        Machine.of(H200, LLAMA31_8B), prefill_floor_s=12e-3, hot_slowdown=0.15
    )
    sizes = [
        *((tokens, 0, 0, 0, False, 0.0) for tokens in (16, 64, 512, 1024, 2048)),
        *((0, 0, n, n * c) for n in (1, 16, 256) for c in (100, 4000)),
        *((tokens, 0, 32, 32_000, True, 0.0) for tokens in (1024, 2000)),
        (2000, 0, 32, 32_000, True, 1.0),
    ]
    steps = [Step(*size[:4], made.step_s(*size), *size[4:]) for size in sizes]
    fitted = fit_from_probe(steps, Machine(host_s=3e-3))
    assert errors(fitted, steps).worst < 0.001
    assert fitted.hot_slowdown == pytest.approx(0.15, rel=0.01)
    assert fitted.prefill_floor_s == pytest.approx(12e-3, rel=0.01)
    assert fitted.host_s == 3e-3


def test_a_probe_of_a_gpu_at_rest_does_not_say_how_hot_it_gets():
    steps = [Step(tokens, 0, 0, 0, tokens * 1e-4) for tokens in (100, 1000, 9000)]
    assert fit_from_probe(steps).hot_slowdown == 0.0
    start = Machine(hot_slowdown=0.1)
    assert fit_from_probe(steps, start).hot_slowdown == 0.1


def test_a_step_that_was_made_ready_costs_the_gpu_alone():
    machine = Machine(host_s=3e-3)
    ready = machine.step_s(64, 8000, 16, 16_000, True)
    at_rest = machine.step_s(64, 8000, 16, 16_000)
    assert ready < machine.prefill_floor_s < at_rest
    assert ready > machine.decode_s(16, 16_000)
    hot = attrs.evolve(machine, hot_slowdown=0.1)
    assert hot.step_s(2000, 0, 0, 0, False, 0.5) > machine.step_s(2000, 0, 0, 0)
    assert hot.decode_s(16, 16_000) == machine.decode_s(16, 16_000)


def test_what_a_probe_cannot_tell_stays():
    prompts = [Step(tokens, 0, 0, 0, tokens * 1e-4) for tokens in (100, 1000, 9000)]
    fitted = fit_from_probe(prompts)
    assert fitted.decode_floor_s == pytest.approx(Machine().decode_floor_s)
    assert fitted.prefill_s(1000.0) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [Step(1, 0, 0, 0, 0.0)],
        [Step(-1, 0, 0, 0, 1.0)],
        [Step(1, 0, 0, 0, 1.0, heat=1.5)],
    ],
)
def test_a_bad_probe_is_refused(steps):
    with pytest.raises(InvalidHardware):
        fit_from_probe(steps)


def test_prefill_and_decode_are_steps():
    machine = Machine()
    assert machine.prefill_s(700.0, 300.0) == pytest.approx(
        machine.step_s(700, 300, 0, 0)
    )
    assert machine.decode_s(8, 900) == machine.step_s(0, 0, 8, 900)
    many = machine.prefill_s(np.array([1.0, 700.0]), np.array([0.0, 300.0]))
    assert many[1] == pytest.approx(machine.prefill_s(700.0, 300.0))


def test_prompts_of_one_step_look_at_their_own_tokens_only():
    machine = attrs.evolve(Machine(), prefix_s_per_token=0.0)
    one, two = machine.prefill_s(1000.0), machine.prefill_s(2000.0)
    both = machine.step_s(2000, merged_context([(1000, 0), (1000, 0)]), 0, 0)
    attention = machine.attention_s_per_token2
    assert both == pytest.approx(two - 1000 * 1000 * attention)
    assert both < 2 * one
    assert merged_context([]) == 0.0


@pytest.mark.parametrize(
    "change",
    [
        {"decode_floor_s": 0.0},
        {"prefill_floor_s": float("nan")},
        {"prefill_s_per_token": -1e-6},
        {"decode_s_per_request": float("inf")},
        {"knee": 0.5},
        {"knee": 200.0},
        {"knee": None},
        {"decode_floor_s": True},
        {"kv_bytes_per_token": float("nan")},
    ],
)
def test_a_machine_that_cannot_be_is_refused(change):
    (name,) = change
    with pytest.raises(InvalidHardware, match=name):
        Machine(**change)


def test_a_step_with_a_prompt_may_add_to_those_that_generate():
    made = attrs.evolve(Machine(), knee=1.0, prefill_floor_s=Machine().decode_floor_s)
    sizes = [(tokens, 0, n, n * 100) for tokens in (0, 64, 512) for n in (1, 8, 32)]
    steps = [Step(*size, made.step_s(*size)) for size in sizes]
    fitted = fit_from_probe(steps)
    assert fitted.knee == 1.0
    assert errors(fitted, steps).worst < 0.001
