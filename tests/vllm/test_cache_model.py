"""The simulator's KV cache beside an engine's, which evicts, request for request."""

import attrs
import numpy as np
import pytest
from tests.vllm.conftest import OPTIONS, running

import llmd
from llmd.adapters.vllm.engine import VllmEngine
from llmd.sim import EngineSettings, simulate, workloads
from llmd.sim.prompts import tokens_of

VOCABULARY = 200


@pytest.fixture
async def small(models):
    """An engine of 40 blocks."""
    options = {**OPTIONS, "num_gpu_blocks_override": 40, "max_model_len": 512}
    engine = VllmEngine(models[0], names=["small"], options=options)
    async with running(engine, "small") as started:
        yield started


async def test_it_finds_what_the_engine_finds(small):
    load = workloads.documents(
        requests=120,
        document_tokens=150,
        question_tokens=20,
        answer_tokens=60,
        seed=3,
    )
    jobs = [
        attrs.evolve(job, at=1000.0 * row, output_tokens=min(job.output_tokens, 100))
        for row, job in enumerate(load.jobs)
        if job.request.prompt_tokens < 400
    ]
    found = []
    for job in jobs:
        asked = llmd.Request(
            id=job.id,
            prompt=tokens_of(job.request.prompt, VOCABULARY),
            max_new_tokens=job.output_tokens,
        )
        first, *_ = await small.answer(asked)
        found.append(first.cached_tokens)
    report = simulate(
        llmd.RoundRobin(),
        attrs.evolve(load, jobs=jobs),
        workers=[small.worker],
        settings=EngineSettings(steps_ahead=0),
    )
    assert report.cached_tokens.tolist() == found
    unlimited = attrs.evolve(small.worker, kv_blocks=100_000)
    ever = simulate(
        llmd.RoundRobin(), attrs.evolve(load, jobs=jobs), workers=[unlimited]
    )
    assert 0 < np.sum(found) < ever.cached_tokens.sum()
