"""Policies that look at more than this moment."""

import math

import pytest

from llmd.autoscaler import (
    Autoscaler,
    Forecast,
    HoltWinters,
    Kpa,
    LatencySlo,
    Load,
    Quantile,
    TokenSupply,
)
from llmd.errors import NoSignal
from llmd.types import State


class Told(Autoscaler):
    wish = 1.0

    def wanted(self, view):
        return self.wish


def test_kpa_panics_and_does_not_shrink_in_panic(make_bench):
    bench = make_bench(1)
    scaler = Kpa(requests_per_worker=5, max_workers=20, patience=0.0, tolerance=0.0)
    counts = []
    for second in range(200):
        bench.load(50 if 60 <= second < 70 else 2)
        bench.wait(1.0)
        counts.append(scaler.target(bench.view))
        bench.fit(counts[-1])
    assert set(counts[:60]) == {1}
    assert counts[69] >= 9
    assert counts[69:120] == [counts[69]] * 51
    assert counts[-1] == 1


def test_token_supply_has_a_dead_band(make_bench):
    bench = make_bench(2, kv_blocks=100)  # 1600 tokens each
    scaler = TokenSupply(max_workers=9)

    def wish(tokens):
        bench.load(0)
        bench.arrive(1, prompt_tokens=tokens)
        return scaler.wanted(bench.view)

    assert wish(2700) == 2  # under 0.85 of 3200
    assert wish(2800) > 2
    assert wish(2300) == 2  # over 0.7 of 3200
    assert wish(1100) == 1  # under 0.7 of 1600
    bench.join(State.STARTING)
    assert wish(4000) == 3  # what is coming counts


def test_latency_inverts_the_step_model():
    slo = LatencySlo(ttft=0.5, itl=0.02, max_workers=64)
    load = Load(400, 800_000, 0, 60_000, 2000)
    fewest = slo.fewest(load)
    ttft, itl = slo.latencies(load, fewest)
    assert ttft <= 0.7 * 0.5
    assert itl <= 0.7 * 0.02
    worse = slo.latencies(load, fewest - 1)
    assert worse[0] > 0.7 * 0.5 or worse[1] > 0.7 * 0.02
    for factor in (1, 2, 3, 5):
        heavier = Load(*[value * factor for value in (400, 8e5, 0, 6e4)], 2000)
        assert slo.fewest(heavier) >= fewest
    assert slo.fewest(Load(0, 0, 0, 0, 0)) == 0
    backlog = Load(400, 800_000, 200_000, 60_000, 2000)
    assert slo.fewest(backlog) > fewest


def test_latency_waits_until_it_has_seen_arrivals(make_bench):
    bench, scaler = make_bench(1), LatencySlo(max_workers=9)
    bench.arrive(1)
    with pytest.raises(NoSignal):
        scaler.wanted(bench.view)
    for _ in range(30):
        bench.wait(1.0)
        bench.arrive(8, prompt_tokens=4000)
        count = scaler.target(bench.view)
    assert count > 3
    assert "prompt tokens/s" in scaler.advice.explain()


def test_holt_winters_learns_a_season():
    series = HoltWinters(period=24)
    day = [100 + 80 * math.sin(2 * math.pi * hour / 24) for hour in range(24)]
    for hour in range(24 * 8):
        series.add(day[hour % 24])
    for ahead in (1, 6, 12, 24):
        assert abs(series.ahead(ahead) - day[(ahead - 1) % 24]) < 5.0


def test_forecast_asks_before_the_load_is_there(make_bench):
    bench = make_bench(1)
    scaler = Forecast(rate_per_worker=2.0, cold_start=60.0, max_workers=50)
    for second in range(300):
        bench.wait(1.0)
        if second % 10 == 0:
            bench.arrive(second // 20)  # grows by 0.005 requests/s each second
        scaler.target(bench.view)
    now, expected = 14 / 10, scaler.rate(bench.view)
    assert expected > now + 0.5 * 60 * 0.005
    assert scaler.advice.workers >= 1


def test_a_quantile_ignores_what_few_requests_saw(make_bench):
    bench, inner = make_bench(1), Told()
    scaler = Quantile(policy=inner, part=0.9, window=100.0, max_workers=99)

    def see(wish, arrivals):
        inner.wish = wish
        bench.wait(1.0)
        bench.arrive(arrivals)
        return scaler.wanted(bench.view)

    assert see(3, 90) == 3
    assert see(50, 9) == 3  # 9 of 99 requests saw it
    assert see(50, 9) == 50  # 18 of 108
    bench.wait(99.5)
    assert see(2, 100) == 2  # all that is long ago
    assert see(1, 0) == 2


def test_latency_leaves_places_in_the_batches():
    slo = LatencySlo(ttft=60.0, itl=60.0, fill=0.5, max_workers=64)
    assert slo.fewest(Load(80, 8000, 0, 10, 100, max_running=16)) == 10
    assert slo.fewest(Load(80, 8000, 0, 10, 100)) == 1


def test_old_prompts_can_be_left_out():
    load = Load(10, 10_000, 400_000, 1000, 1000)
    known = {"ttft": 1.0, "itl": 1.0, "max_workers": 64}
    assert LatencySlo(**known).fewest(load) > 3
    assert LatencySlo(**known, backlog=False).fewest(load) == 1
