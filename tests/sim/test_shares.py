"""What each tenant got, against the requests themselves."""

import attrs
import numpy as np
import pytest

import llmd
from llmd.sim import Job, Workload, shares, simulate


def job(row):
    request = llmd.Request(
        id=f"r{row}",
        prompt=range(100),
        tenant="big" if row % 4 else "small",
        priority=row % 2,
    )
    return Job(request=request, output_tokens=10, at=0.001 * row)


@pytest.fixture(scope="module")
def report():
    jobs = [job(row) for row in range(80)]
    return simulate(llmd.LeastLoaded(), Workload(name="two", jobs=jobs), workers=1)


def test_every_request_is_counted_once(report):
    table = shares(report)
    assert {name: row.requests for name, row in table.rows.items()} == {
        "small": 20,
        "big": 60,
    }
    assert table["small"].completed == 20
    assert table["big"].served_tokens == 60 * 110
    assert table.jain == pytest.approx((20 + 60) ** 2 / (2 * (20**2 + 60**2)))
    assert "small" in repr(table)
    assert "<table>" in table._repr_html_()


def test_percentiles_are_those_of_its_requests(report):
    odd = np.arange(80) % 2 == 1
    wanted = np.percentile((report.first - report.arrived)[odd], 99)
    assert shares(report, by="priority")["1"].ttft_p99_s == pytest.approx(wanted)


def test_what_never_began_is_served_nothing(report):
    never = attrs.evolve(
        report,
        first=np.full(80, np.nan),
        output_tokens=np.zeros(80, dtype=np.int64),
        status=("",) * 80,
    )
    row = shares(never)["big"]
    assert row.served_tokens == row.completed == 0
    assert np.isnan(row.ttft_p50_s)


def test_another_division_is_refused(report):
    with pytest.raises(ValueError, match="planet"):
        shares(report, by="planet")
