"""Each rule of another system gives what its published formula gives by hand."""

import numpy as np
import pytest

import llmd
from llmd.router import rivals


def chosen(router, request, view):
    return router.route(request, view).decode


class TestLlmd:
    def test_three_two_two(self, stub, ask):
        # 160 tokens; held 80 and 0; KV .25 and .5 used; queues 2 and 0.
        view = stub(
            GPU=[80, 0],
            context_tokens=[4000, 8000],
            waiting_requests=[2, 0],
        ).view
        costs = rivals.llm_d().cost(ask(), view)
        assert costs.tolist() == pytest.approx(
            [-(3 * 0.5 + 2 * 0.75 + 2 * 0), -(3 * 0 + 2 * 0.5 + 2 * 1)]
        )

    def test_token_load(self, stub, ask):
        view = stub(context_tokens=[0, 1000, 9000]).view
        score = rivals.TokenLoad(threshold_tokens=4000)
        rated = score.rate(score.signal(ask(), view))
        assert rated.tolist() == [1.0, 0.75, 0.0]

    def test_sticky_workers_only_while_they_are_fast_enough(self, stub, ask):
        router = rivals.LlmdAffinity(peak_tokens_per_s=1000.0, max_penalty_s=5.0)
        view = stub(GPU=[128, 160, 0], context_tokens=[5000, 4999, 0]).view
        assert chosen(router, ask(), view) == "w1"  # both sticky: the less loaded
        view = stub(GPU=[128, 160, 0], context_tokens=[9000, 5001, 0]).view
        assert chosen(router, ask(), view) == "w2"  # 5.001 s slower than w2
        view = stub(GPU=[127, 100, 0], context_tokens=[10, 10, 5]).view
        assert chosen(router, ask(), view) == "w2"  # 7 of 10 blocks is under 0.8


class TestDynamo:
    def test_blocks(self, stub, ask):
        # Blocks of 16: prompt 10. Worker 0 holds 4 in GPU and 2 more in CPU; 32
        # tokens queued there; 320 tokens decoded.
        view = stub(
            GPU=[64, 0],
            CPU=[96, 0],
            prefill_tokens=[32, 0],
            context_tokens=[320, 160],
        ).view
        costs = rivals.DynamoBlocks().cost(ask(), view)
        first = max(0.0, (2 + 10) - (4 + 0.75 * 2)) + (320 + 160) / 16
        assert costs.tolist() == pytest.approx([first, 10 + (160 + 160) / 16])

    def test_more_credit_than_prefill_costs_nothing_not_less(self, stub, ask):
        view = stub(GPU=[160, 160]).view
        router = rivals.DynamoBlocks(overlap_credit=2.0)
        assert router.cost(ask(), view).tolist() == [10.0, 10.0]

    def test_credit_decays_with_the_backlog(self, stub, ask):
        view = stub(GPU=[160, 0], prefill_tokens=[320, 160]).view
        router = rivals.DynamoBlocks(credit_decay=1.0)
        # Worker 0 has (320 - 160) / 16 = 10 excess blocks, as many as the prompt.
        assert router.cost(ask(), view)[0] == pytest.approx((20 + 10) - 10 / 2 + 10)

    def test_disk_and_requests(self, stub, ask):
        view = stub(DISK=[160, 0], running_requests=[3, 0]).view
        router = rivals.DynamoBlocks(active_request_weight=2.0)
        assert router.cost(ask(), view).tolist() == [7.5 + 10 + 6, 20.0]


class TestVllm:
    def test_longest_match_then_least_load(self, stub, ask):
        router = rivals.VllmKVAware()
        loads = {"running_requests": [9, 0, 1]}
        assert chosen(router, ask(), stub(GPU=[32, 0, 16], **loads).view) == "w0"
        assert chosen(router, ask(), stub(GPU=[0, 0, 0], **loads).view) == "w1"


class TestSglang:
    def test_balanced_follows_the_match_beyond_the_threshold(self, stub, ask):
        router = rivals.SglangCacheAware()
        loads = {"running_requests": [64, 0]}
        assert chosen(router, ask(), stub(GPU=[64, 0], **loads).view) == "w0"
        assert chosen(router, ask(), stub(GPU=[48, 0], **loads).view) == "w1"

    def test_imbalanced_takes_the_shortest_queue(self, stub, ask):
        router = rivals.SglangCacheAware()
        view = stub(GPU=[160, 0], running_requests=[65, 0]).view
        assert chosen(router, ask(), view) == "w1"
        # 65 apart, but not 1.5 times as many.
        view = stub(GPU=[160, 0], running_requests=[195, 130]).view
        assert chosen(router, ask(), view) == "w0"


class TestAibrix:
    def test_best_match_within_the_deviations(self, stub, ask):
        loads = [6, 2, 2, 2, 2, 2]
        mean, deviation = np.mean(loads), np.std(loads)
        assert mean + 2 * deviation < 6 < mean + 3 * deviation
        view = stub(GPU=[160, 32, 16, 0, 0, 0], running_requests=loads).view
        assert chosen(rivals.AibrixPrefix(), ask(), view) == "w1"
        assert chosen(rivals.AibrixPrefix(deviations=3.0), ask(), view) == "w0"

    def test_equal_matches_go_by_load(self, stub, ask):
        view = stub(GPU=[32, 32, 0], running_requests=[3, 2, 0]).view
        assert chosen(rivals.AibrixPrefix(), ask(), view) == "w1"

    def test_without_a_match_the_least_loaded(self, stub, ask):
        view = stub(GPU=[0, 0], running_requests=[3, 2]).view
        assert chosen(rivals.AibrixPrefix(), ask(), view) == "w1"

    def test_gate_on_severe_imbalance(self, stub, ask):
        # 20 > 2 * (mean + 1) and 20 above the least: only idle workers may match.
        view = stub(GPU=[160, 16, 0], running_requests=[20, 0, 0]).view
        assert chosen(rivals.AibrixPrefix(deviations=9.0), ask(), view) == "w1"


def test_all_have_a_name():
    assert len(rivals.RIVALS) == 6
    for make in rivals.RIVALS.values():
        assert isinstance(make(), llmd.Router)
