"""On a real trace a shared first block must not pull everyone to one worker.

All of Mooncake's conversations begin with the same block, so that "who holds
most of it" is decided by the first request for ever.
"""

from pathlib import Path

import pytest

import llmd
from llmd.router import rivals
from llmd.sim import simulate, traces

TRACE = Path(__file__).parents[1] / "data" / "mooncake_conversation_300.jsonl"
WORKERS = 8


@pytest.fixture(scope="module")
def load():
    return traces.mooncake(TRACE)


def busiest(router, load):
    """Return the busiest worker's work, in units of the mean."""
    report = simulate(router, load, workers=WORKERS)
    assert report.completed == 300
    return report.imbalance


@pytest.mark.parametrize(
    "router", [1 * llmd.PrefixOverlap(), rivals.VllmKVAware()], ids=repr
)
def test_pure_longest_prefix_sends_nearly_all_to_one_worker(router, load):
    assert busiest(router, load) > 0.9 * WORKERS


@pytest.mark.parametrize(
    "router",
    [
        llmd.Cluster().router,
        llmd.EarliestFirstToken(),
        llmd.LeastWork(),
        llmd.LeastLoaded(),
        llmd.PowerOfTwo(),
        llmd.RoundRobin(),
        llmd.Random(),
        llmd.SessionAffinity(),
        rivals.llm_d(),
    ],
    ids=lambda router: repr(router)[:40],
)
def test_no_default_does(router, load):
    assert busiest(router, load) < 2.0
