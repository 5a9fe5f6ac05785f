"""A routing policy of one's own, against round robin, in ten lines."""

from llmd import RoundRobin, Router
from llmd.sim import compare, workloads


class CachedAndIdle(Router):
    def cost(self, request, view):
        return view.uncached_tokens(request) + view.workers.prefill_tokens


load = workloads.shared_prefix(rate=12, requests=500, groups=40, answer_tokens=100)
print(compare([RoundRobin(), CachedAndIdle()], load, workers=4))
