"""The fewest workers that keep a latency promise, from the step model."""

from __future__ import annotations

import math

import attrs

from ..errors import NoSignal
from ..machines import Machine
from ..recommendation import Proposal
from ..view import View
from .amounts import positive
from .interface import Autoscaler
from .window import Mean, Meter, moment


@attrs.frozen
class Load:
    """What a fleet bears, summed over its workers.

    Attributes:
        requests: Running and waiting, mean of the window.
        context_tokens: Of these, those still waiting with their prompts.
        backlog_tokens: Prompt tokens not yet computed.
        prefill_rate: Prompt tokens to compute, a second.
        prompt_tokens: Mean to compute for one request.
        max_running: Requests that one worker batches at once, mean.
    """

    requests: float
    context_tokens: float
    backlog_tokens: float
    prefill_rate: float
    prompt_tokens: float
    max_running: float = math.inf


@attrs.define(kw_only=True)
class LatencySlo(Autoscaler):
    """Has the fewest workers whose step times still keep both latencies.

    The worker's step model (`Machine`) is inverted.  With the load spread
    over n workers, of each worker's time a part p goes into prompts, so

        time between tokens = decode step(requests / n, context / n) / (1 - p)
        first token = prefill / (1 - p) + queued prefill + one step

    where queued prefill is what waits now, or the mean wait of random
    arrivals (M/D/1), whichever is longer.  Both fall with n, so the answer is
    found by bisection.

    Attributes:
        machine: Step times of a worker.
        ttft: Seconds to the first token.
        itl: Seconds between two tokens.
        window: Seconds over which arrivals are counted and load is averaged;
            what waits to be computed counts as it stands.
        most: Share of a worker's time that prompts may take.
        headroom: Part of both latencies that is aimed at: the mean must stay
            under the promise for its tail to keep it.
        fill: Part of each worker's batch that may be in use: what arrives
            next must find a place in one.
        backlog: Whether prompts that wait now count.  New workers help with
            them only if they start faster than the others get through them.

    >>> slo = LatencySlo(machine=Machine(), ttft=0.5, itl=0.02, max_workers=64)
    >>> slo.fewest(Load(400, 800_000, 0, 60_000, 2000))
    4
    """

    machine: Machine = attrs.field(factory=Machine)
    ttft: float = attrs.field(default=1.0, validator=positive)
    itl: float = attrs.field(default=0.05, validator=positive)
    window: float = attrs.field(default=60.0, validator=positive)
    most: float = attrs.field(default=0.8, validator=positive)
    headroom: float = attrs.field(default=0.7, validator=positive)
    fill: float = attrs.field(default=0.7, validator=positive)
    backlog: bool = True
    _uncached: Meter = attrs.field(init=False)
    _arrived: Meter = attrs.field(init=False)
    _requests: Mean = attrs.field(init=False)
    _context: Mean = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self._uncached, self._arrived = Meter(self.window), Meter(self.window)
        self._requests = Mean(longest=self.window)
        self._context = Mean(longest=self.window)

    def proposals(self, view: View) -> tuple[Proposal, ...]:
        try:
            load = self.load(view)
        except NoSignal as error:
            return (Proposal.untold("LatencySlo", error),)
        workers = self.fewest(load)
        ttft, itl = self.latencies(load, max(workers, 1))
        note = (
            f"{load.requests:.4g} requests, {load.prefill_rate:.4g} prompt tokens/s:"
            f" ttft {ttft:.3g} s, itl {itl:.3g} s"
        )
        return (Proposal("LatencySlo", float(workers), note),)

    def wanted(self, view: View) -> float:
        return float(self.fewest(self.load(view)))

    def load(self, view: View) -> Load:
        """Measure what the fleet bears now.

        Raises:
            NoSignal: Arrivals have not been watched yet, and something runs, or
                nothing has happened at all.
        """
        workers, totals, now = view.workers, view.totals, moment(view)
        waiting = view.waiting.prompt_tokens
        rate = self._uncached.rate(now, totals.uncached_tokens + waiting)
        arrivals = self._arrived.rate(now, totals.requests)
        requests = int(workers.running_requests.sum()) + len(view.waiting)
        self._requests.add(now, requests)
        self._context.add(now, int(workers.context_tokens.sum()) + waiting)
        if math.isnan(rate):
            if requests:
                raise NoSignal("arrivals have not been watched long enough")
            rate = arrivals = 0.0
        return Load(
            requests=self._requests.over(now, self.window),
            context_tokens=self._context.over(now, self.window),
            backlog_tokens=int(workers.prefill_tokens.sum()) + waiting,
            prefill_rate=max(rate, 0.0),
            prompt_tokens=max(rate, 0.0) / arrivals if arrivals > 0 else 0.0,
            max_running=float(workers.max_running.mean()) if len(workers) else math.inf,
        )

    def fewest(self, load: Load) -> int:
        """Return the fewest workers that keep both latencies under *load*."""
        if not load.requests and not load.prefill_rate:
            return 0
        # The last count known to be too few, and one that may be enough.
        low = math.ceil(load.requests / (self.fill * load.max_running)) - 1
        low = min(max(low, 0), max(self.max_workers - 1, 0))
        high = low + 1
        while not self._kept(load, high) and high < self.max_workers:
            low, high = high, min(2 * high, self.max_workers)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._kept(load, middle) else (middle, high)
        return high

    def latencies(self, load: Load, workers: int) -> tuple[float, float]:
        """Return seconds to the first token, and between two, on *workers*."""
        machine = self.machine
        step = machine.decode_s(load.requests / workers, load.context_tokens / workers)
        own = machine.prefill_s(load.prompt_tokens) if load.prompt_tokens else 0.0
        each = own / load.prompt_tokens if load.prompt_tokens else 0.0
        busy = load.prefill_rate / workers * each
        if busy >= self.most:
            return math.inf, math.inf
        waits = load.backlog_tokens / workers * machine.prefill_s_per_token
        queued = max(waits if self.backlog else 0.0, own * busy / (2 * (1 - busy)))
        return own / (1 - busy) + queued + step, step / (1 - busy)

    def _kept(self, load: Load, workers: int) -> bool:
        ttft, itl = self.latencies(load, workers)
        return ttft <= self.headroom * self.ttft and itl <= self.headroom * self.itl
