"""Slots of prompts that are given up while their layers are still gathered."""

import os
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("nixl")
pytest.importorskip("xxhash")

from llmd.transport import LocalTransport, TransferId
from llmd.transport.local import LocalLink

LAYERS = ("one", "two")
BLOCK_VALUES = 8
SLOTS = 4


@pytest.fixture
def worker():
    # Not sooner: vLLM warns of its own deprecations when it is imported.
    from llmd.adapters.vllm.connector_staging import Staging
    from llmd.adapters.vllm.connector_worker import WorkerSide

    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_connector_extra_config={"layerwise": True}
        ),
        cache_config=SimpleNamespace(num_gpu_blocks=16, block_size=1),
        model_config=SimpleNamespace(model="m", quantization=None),
    )
    caches = {name: torch.zeros(16, BLOCK_VALUES) for name in LAYERS}
    worker = WorkerSide(config)
    slot_bytes = len(LAYERS) * BLOCK_VALUES * 4
    worker._staging = Staging(caches, config, SLOTS * slot_bytes)
    slab = worker._staging.slab()
    link = LocalLink(clock=time.monotonic)
    worker._transport = LocalTransport(link, slab.layout, slab.owner.numpy())
    yield worker
    worker.close()


def planned(id, blocks):
    """Return a step that completes a prompt."""
    from llmd.adapters.vllm.connector_plan import Plan, Save

    save = Save(id, start=0, blocks=blocks, total=len(blocks), last=True)
    return Plan(saves=[save])


def given_up(worker, id):
    """Let the offer of *id* end, as when its decode engine has gone."""
    worker._later.submit(worker._transport.cancel, id, "gone").result()


def test_slots_stay_with_a_prompt_until_its_last_layer_is_gathered(worker):
    first, second = TransferId.fresh("a"), TransferId.fresh("b")
    plan = planned(first, (1, 2, 3))
    worker.save_layer(plan, "one")
    given_up(worker, first)
    assert worker._take(SLOTS) is None  # looks at what was freed
    worker.save_layer(plan, "two")
    worker.save(plan)
    assert worker.counts()["free_slots"] == SLOTS
    plan = planned(second, (4, 5, 6, 7))
    for name in LAYERS:
        worker.save_layer(plan, name)
    worker.save(plan)
    given_up(worker, second)
    assert worker.counts()["free_slots"] == SLOTS
    assert not worker.counts()["offers"]


def test_layers_that_were_not_told_of_are_gathered_at_the_end(worker):
    id = TransferId.fresh("a")
    plan = planned(id, (1, 2))
    worker.save_layer(plan, "one")
    worker.save(plan)
    worker._later.submit(lambda: None).result()
    offered = worker._transport._endpoint.sources.offers[id]
    assert offered._ready == {0, 1}


@pytest.mark.parametrize("refused", [False, True])
def test_blocks_come_back_as_they_were_where_memory_is_shared_or_not(
    worker, refused, monkeypatch
):
    from llmd.adapters.vllm.connector_staging import Staging

    def refuse(*_):
        raise PermissionError("no memfd in this sandbox")

    if refused:
        monkeypatch.setattr(os, "memfd_create", refuse)
    caches = {name: torch.rand(16, BLOCK_VALUES) for name in LAYERS}
    before = {name: cache.clone() for name, cache in caches.items()}
    config, slot_bytes = worker._vllm_config, len(LAYERS) * BLOCK_VALUES * 4
    staging = Staging(caches, config, SLOTS * slot_bytes, through_host=True)
    slab = staging.slab()
    assert slab.memory == "DRAM"
    assert (slab.shared is None) == refused
    staging.gather((3, 9, 4), (0, 1, 2))
    for cache in caches.values():
        cache.zero_()
    staging.scatter((2, 0, 1), (7, 8, 15))
    for name, cache in caches.items():
        assert (cache[[7, 8, 15]] == before[name][[4, 3, 9]]).all()
        assert not cache[[3, 4, 9]].any()
