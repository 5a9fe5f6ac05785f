"""Figures of tenants."""

import pathlib
import random
import runpy
from types import SimpleNamespace

import pytest

import llmd
from llmd import balancer as b


def test_accounts_say_who_waits_and_was_served(shop):
    control = b.FlowControl(b.Vtc())
    sim = shop(control, places=1)
    first = sim.arrive("a", 30)
    sim.arrive("b", 10)
    sim.token(first)
    sim.token(first, 4)
    accounts = control.accounts
    assert accounts["a"].running == accounts["b"].waiting == 1
    assert accounts["a"].served_tokens == 35
    assert accounts["b"].served_tokens == 0
    sim.wait(3.0)
    sim.end(first)
    assert accounts["b"].waits.quantile(0.5) == pytest.approx(3.0, rel=0.05)
    assert accounts["a"].idle


def test_the_gap_is_between_those_who_wait(shop):
    for order, narrow in ((b.Vtc(), True), (b.Fcfs(), False)):
        control = b.FlowControl(order)
        sim = shop(control, places=1)
        for _ in range(20):
            sim.arrive("a", 50)
        for _ in range(5):
            sim.arrive("b", 50)
        for _ in range(8):
            sim.end(next(iter(sim.where)))
        assert (control.accounts.service_gap <= 100) is narrow
        assert (control.accounts.jain() > 0.7) is narrow


def test_quantiles_are_within_a_bucket():
    rng = random.Random(1)
    waits, values = b.Waits(), [rng.expovariate(1.0) for _ in range(5000)]
    for value in values:
        waits.add(value)
    values.sort()
    for part in (0.1, 0.5, 0.9, 0.99):
        exact = values[int(part * len(values))]
        assert waits.quantile(part) == pytest.approx(exact, rel=0.06)


def test_accounts_are_bounded_and_lose_no_totals(shop):
    accounts = b.Accounts(most=10)
    control = b.FlowControl(b.Fcfs(), accounts=accounts)
    sim = shop(control, places=99)
    busy = sim.arrive("busy", 7)
    for number in range(100):
        sim.end(sim.arrive(f"t{number}", 5))
    assert len(accounts) <= 11
    assert accounts["busy"].running == 1
    kept = sum(account.prompt_tokens for _, account in accounts.items())
    assert kept + accounts.others.prompt_tokens == 507
    sim.end(busy)


def test_accounts_are_few_again_after_a_flood_of_tenants(shop):
    accounts = b.Accounts(most=10)
    sim = shop(b.FlowControl(b.Fcfs(), accounts=accounts), places=1)
    running = sim.arrive("first", 5)
    flood = [sim.arrive(f"f{number}", 5) for number in range(200)]
    assert len(accounts) == 201
    for id in flood:
        sim.cancel(id)
    sim.end(running)
    for number in range(400):
        sim.end(sim.arrive(f"n{number}", 5))
    assert len(accounts) <= 11


def request(tenant):
    return llmd.Request(id=f"r{tenant}", prompt=[1], tenant=tenant)


def test_idle_accounts_go_soon_whoever_comes_next():
    accounts, view = b.Accounts(most=1000), SimpleNamespace(now=0.0)
    flood = [request(f"f{number}") for number in range(5000)]
    for each in flood:
        accounts.queued(each, view)
    # Those that still wait are the oldest, and in the way.
    for each in flood[500:]:
        accounts.unqueued(each, view)
    returns = request("f0")
    for _ in range(5000 // 16):
        accounts.queued(returns, view)
        accounts.unqueued(returns, view)
    assert len(accounts) == 1000
    assert all(accounts[each.tenant].waiting for each in flood[:500])


def test_busy_accounts_stay_and_idle_ones_among_them_go():
    accounts, view = b.Accounts(most=10), SimpleNamespace(now=0.0)
    for number in range(300):
        accounts.queued(request(f"busy{number}"), view)
    for number in range(2000):
        accounts.queued(request(f"n{number}"), view)
        accounts.unqueued(request(f"n{number}"), view)
        # One round over the busy ones is 300 / 16 arrivals.
        assert len(accounts) <= 300 + 2 * 300 // 16
    assert sum(account.waiting for _, account in accounts.items()) == 300


def test_metrics_tell_of_tenants_and_bands(shop):
    prometheus = pytest.importorskip("prometheus_client")
    from llmd.adapters.prometheus import ServerCollector
    from llmd.live import Server

    bands = b.Bands([b.Band(name="chat"), b.Band(name="batch")])
    sim = shop(b.FlowControl(bands), places=1)
    sim.token(sim.arrive("a", 30))
    sim.arrive("b", 10, priority=1)
    registry = prometheus.CollectorRegistry()
    registry.register(ServerCollector(Server(sim.cluster)))

    def value(name, /, **labels):
        return registry.get_sample_value(name, labels)

    assert value("llmd_tenant_waiting_requests", tenant="b") == 1
    served = "llmd_tenant_served_tokens_total"
    assert value(served, tenant="a", kind="prompt") == 30
    assert value(served, tenant="a", kind="output") == 1
    assert value("llmd_tenant_wait_seconds", tenant="a", quantile="0.99") < 1e-3
    assert value("llmd_band_waiting_requests", band="batch") == 1
    assert value("llmd_band_served_tokens_total", band="chat", kind="prompt") == 30
    assert value("llmd_band_wait_seconds", band="chat", quantile="0.99") < 1e-3
    assert value("llmd_jain_index", name="llmd") == 0.5
    sim.cluster.balancer = bands
    assert value("llmd_band_waiting_requests", band="batch") == 1
    sim.cluster.balancer = llmd.Fcfs()
    assert value("llmd_jain_index", name="llmd") is None


def test_the_example_shows_what_it_says(capsys):
    here = pathlib.Path(__file__).parents[2]
    runpy.run_path(str(here / "examples/fair_tenants.py"))["main"]()
    p99 = [
        float(line.split("p99")[1].split()[0])
        for line in capsys.readouterr().out.splitlines()
    ]
    assert p99[0] > 5 * max(p99[1:])
