"""A tenant floods: what the others feel, with and without fairness.

python examples/fair_tenants.py [PICTURE.png]
The last policy is your own, in ten lines; a live server takes the same objects.
"""

import sys

import numpy as np

import llmd
from llmd import balancer as b
from llmd.sim import Job, Simulator, Workload, fleet
from llmd.sim.prompts import SegmentPrompt

SECONDS, WORKERS = 20.0, 2


class LeastServed(llmd.QueueBalancer):
    """Whoever was given the fewest tokens goes next."""

    def __init__(self):
        self.tokens = {}

    def key(self, request, view):
        return request.priority

    def flow(self, request):
        return request.tenant

    def turn(self, flow, view):
        return self.tokens.get(flow, 0)

    def dispatched(self, booking, view):
        tenant, tokens = booking.request.tenant, booking.request.prompt_tokens
        self.tokens[tenant] = self.tokens.get(tenant, 0) + tokens


def tenant(name, rate, start=0.0, seed=0):
    rng = np.random.default_rng(seed)
    times = start + np.cumsum(rng.exponential(1 / rate, int(rate * (SECONDS - start))))
    jobs = []
    for row, at in enumerate(times):
        prompt = SegmentPrompt([(int(rng.integers(1 << 40)), 1500)])
        request = llmd.Request(id=f"{name}-{row}", tenant=name, prompt=prompt)
        jobs.append(Job(request=request, output_tokens=20, at=float(at)))
    return jobs


def main(picture=None):
    jobs = [job for k in range(4) for job in tenant(f"calm{k}", 3.0, seed=k)]
    jobs += tenant("flood", 60.0, start=5.0, seed=9)
    policies = {
        "first come, first served": b.Fcfs,
        "virtual token counter": b.Vtc,
        "ten lines of one's own": LeastServed,
    }
    series = {}
    for name, order in policies.items():
        rooms = [b.FixedRoom(prefill_tokens=2048)]
        cluster = llmd.Cluster(balancer=b.FlowControl(order(), rooms=rooms))
        workload = Workload(name="flood", jobs=jobs)
        report = Simulator(cluster).run(workload, fleet(WORKERS), until=SECONDS)
        calm = np.array([id.startswith("calm") for id in report.ids])
        # Whom nobody has answered yet has waited until the end at least.
        first = np.where(np.isnan(report.first), SECONDS, report.first)
        ttft = (first - report.arrived)[calm]
        series[name] = report.arrived[calm], ttft
        during = ttft[report.arrived[calm] > 5.0]
        p50, p99 = np.percentile(during, [50, 99])
        print(f"{name:26} calm tenants' TTFT p50 {p50:5.3f} s, p99 {p99:5.3f} s")
    if picture:
        plot(series, picture)


def plot(series, picture):
    from matplotlib import pyplot

    for name, (arrived, ttft) in series.items():
        pyplot.semilogy(arrived, ttft, ".", label=name)
    pyplot.axvline(5.0, color="grey")
    pyplot.xlabel("arrival (s); the flood begins at 5")
    pyplot.ylabel("time to first token (s)")
    pyplot.legend()
    pyplot.savefig(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
