"""What a probe of real engines makes of the times it sees."""

import itertools
from types import SimpleNamespace

import attrs
import pytest

import llmd
from llmd.adapters.vllm import probe
from llmd.adapters.vllm.probe import Asked, calibrate
from llmd.adapters.vllm.probe_sizes import Sizes
from llmd.adapters.vllm.probe_times import launch, longer
from llmd.errors import EngineError
from llmd.live import Server

SMALL = {"vocabulary": 512, "step_tokens": 512, "kv_tokens": 4000, "shared": True}


@pytest.mark.parametrize("told_late_s", [0.0, 0.012])
def test_the_step_of_a_prompt_is_found_whichever_gap_it_shows_in(told_late_s):
    """Steps of 5 ms, one of 30; the outcome before it may be told late."""
    steps = [0.005] * 20 + [0.030] + [0.005] * 20
    times = list(itertools.accumulate(steps))
    asked, came = times[18] + 0.002, times[20]
    times[19] += told_late_s
    found = longer(times, asked, came, 1)
    assert found == pytest.approx(0.030)
    assert max(b - a for a, b in itertools.pairwise(times)) == pytest.approx(
        0.030 - told_late_s
    )


def test_several_prompts_are_told_by_their_sum():
    """Steps of 5 ms; three of 20, 30 and 40 among them."""
    steps = [0.005] * 20 + [0.020] + [0.005] * 3 + [0.030, 0.040] + [0.005] * 20
    times = list(itertools.accumulate(steps))
    found = longer(times, times[18] + 0.002, times[25], 3)
    assert found == pytest.approx(0.030)


def test_a_launch_is_the_longest_gap_and_the_next():
    """Decoding at 5 ms; 11 to launch a prompt, 3 for the step behind it."""
    gaps = [0.005] * 20 + [0.011, 0.003, 0.0045] + [0.005] * 20
    times = list(itertools.accumulate(gaps))
    found = launch(times, times[18] + 0.002, times[21])
    assert found == pytest.approx((0.011, 0.003))


@pytest.mark.parametrize(
    ("longest", "running", "kv_tokens"),
    [(1024, 16, 4000), (512, 1, 600), (32_768, 256, 800_000), (300, 3, 100_000)],
)
def test_what_a_probe_asks_for_fits(longest, running, kv_tokens):
    for shared in (True, False):
        sizes = Sizes.chosen(
            vocabulary=512,
            step_tokens=2048,
            longest=longest,
            running=running,
            kv_tokens=kv_tokens,
            shared=shared,
        )
        room = min(longest, kv_tokens)
        assert max(sizes.contexts) + max(sizes.prompts) < room
        assert max(sizes.prompts) <= sizes.step_tokens
        assert max(sizes.batches) == running
        assert min(sizes.batches) == 1
        assert sizes.contexts[0] == 0
        assert len(sizes.contexts) == 3
        for requests in sizes.beside:
            assert requests < running
            assert requests * sizes.contexts[1] < kv_tokens


@pytest.mark.parametrize("size", ["longest", "kv_tokens", "step_tokens"])
def test_an_engine_of_short_requests_tells_nothing(size):
    with pytest.raises(EngineError, match="too short"):
        Sizes.chosen(**{**SMALL, "running": 8, "longest": 1024, size: 20})


async def test_an_engine_of_another_kind_cannot_be_probed(make_engine):
    async with Server(llmd.Cluster()) as server:
        await server.add(make_engine(), "a")
        with pytest.raises(EngineError, match="ScriptedEngine"):
            await calibrate(server)


@pytest.mark.parametrize(
    "bad",
    [
        {"contexts": (0,)},
        {"contexts": (16, 32)},
        {"prompts": ()},
        {"joining": (0,)},
        {"vocabulary": 15},
        {"batches": (2, 4)},
        {"answer": 3},
    ],
)
def test_sizes_that_make_no_probe_are_refused(bad):
    good = Sizes.chosen(**SMALL, running=8, longest=1024)
    with pytest.raises(EngineError, match=next(iter(bad))):
        attrs.evolve(good, **bad)


async def test_who_asks_meanwhile_is_noticed():
    router = Asked()
    view = llmd.Cluster().view
    router.cost(llmd.Request(id="r", prompt=range(9), session="nobody"), view)
    assert router.others == 1


@pytest.mark.parametrize(
    ("tokens", "caches", "why"), [(512, False, "prefix caching"), (100, True, "of 512")]
)
def test_an_engine_that_sizes_do_not_fit_is_refused(tokens, caches, why):
    sizes = Sizes.chosen(**{**SMALL, "running": 8, "longest": 1024})
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=tokens),
        cache_config=SimpleNamespace(enable_prefix_caching=caches),
    )
    with pytest.raises(EngineError, match=why):
        probe._fitting(sizes, config)
