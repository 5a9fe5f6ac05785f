"""When steps end whose launch the host prepares while the GPU computes.

vLLM with asynchronous scheduling (`v1/engine/core.py`, `step_with_batch_queue`) has
two steps under way: it launches step n + 1 and then waits for what came of step n,
which nobody sees before.  With R the times at which outcomes are seen, G those at
which the GPU is done, g what a step takes the GPU and h what it takes the host:

    G[n] = max(G[n-1], R[n-2] + h[n]) + g[n]      with no prompt: one CUDA graph
    G[n] = max(G[n-1] + g[n], R[n-2] + h[n])      with one: it runs while launched
    R[n] = max(G[n], R[n-1] + h[n+1])

So a step without a prompt seems slow when one with a prompt is launched behind it,
the one with the prompt seems fast, and where prompts follow each other the host is
all that counts.  An H200 was seen to do so (`docs/explanation/simulator.md`).

A GPU is warm by how much of the time it has multiplied lately, and not waited for
its memory: with prompts nearly always, with large batches now and then.
"""

from __future__ import annotations

import math

import attrs

from ..machines import Machine
from .steps import Run

WARMING_S = 0.1
"""Seconds in which a GPU gets warm, and cools; on an H200 0.05 to 0.2 fit as well."""


@attrs.define(eq=False)
class Pace:
    """How far a GPU is ahead of what its host has seen, and how warm it is.

    Attributes:
        machine: Whose.
        ahead: Steps are launched while the one before runs; that is of no account
            where the machine does not say what it takes.
        matters: Steps with prompts that are alike take different times.
        heat: Of the GPU, [0, 1].

    >>> pace = Pace(Machine(host_s=3e-3), ahead=True)
    >>> pace.begin(0.0)
    >>> pace.ready
    False
    >>> run = Run(0.0, 1, 5e-3)
    >>> pace.run(run, busy_s=3e-3, next_s=18e-3, prompts=False)
    >>> round(run.end, 4)  # the one behind it has a prompt, and takes the host 18 ms
    0.021
    >>> pace.ended(run, 0.0)
    >>> pace.begin(run.end)
    >>> run = Run(run.end, 1, 6e-3)
    >>> pace.run(run, busy_s=18e-3, next_s=3e-3, prompts=True)
    >>> round(run.end, 4)  # which ran while it was launched
    0.024
    """

    machine: Machine
    ahead: bool
    matters: bool = attrs.field(init=False)
    heat: float = attrs.field(default=0.0, init=False)
    ready: bool = attrs.field(default=False, init=False)
    # For how long the GPU was done with the last step when that was seen: R - G.
    _lag_s: float = attrs.field(default=0.0, init=False)
    # Between when the host could launch the next step and when the last was seen.
    _spare_s: float = attrs.field(default=0.0, init=False)
    # Of the run under way: what each step takes the host, h; and when the GPU is done
    # with its first, G.
    _busy_s: float = attrs.field(default=0.0, init=False)
    _done: float = attrs.field(default=0.0, init=False)
    _ended: float = attrs.field(default=-math.inf, init=False)

    def __attrs_post_init__(self) -> None:
        self.ahead = self.ahead and self.machine.host_s > 0
        self.matters = self.ahead or self.machine.hot_slowdown > 0

    def begin(self, now: float, *, rested: bool = False) -> None:
        """See whether the step that begins *now* follows another.

        Args:
            now: When it does.
            rested: The GPU waits for something else first.
        """
        self.ready = self.ahead and now <= self._ended and not rested
        if not self.ready and self.heat:
            self.heat *= math.exp((self._ended - now) / WARMING_S)

    def run(self, run: Run, busy_s: float, next_s: float, prompts: bool) -> None:
        """Let *run* end when it does, if steps are launched ahead.

        Args:
            run: What the GPU takes for it.
            busy_s: For which each step of it keeps the host busy.
            next_s: For which the steps that follow do.
            prompts: They compute parts of prompts.
        """
        if not self.ahead:
            return
        self._busy_s, run.least_s, lag_s = busy_s, next_s, 0.0
        if self.ready:
            # No graph begins, and no prompt is done, before it is launched.
            most = max(self._spare_s - busy_s, 0.0) + (run.first_s if prompts else 0.0)
            lag_s = min(self._lag_s, most)
        elif run.steps == 1 and next_s:
            # Behind the first step from rest the second is launched at once.
            run.least_s += busy_s
        self._done = run.start + run.first_s - lag_s
        run.lag_s = min(lag_s, max(run.first_s - run.least_s, 0.0))

    def ended(self, run: Run, multiplied_s: float) -> None:
        """Take in that *run* is over.

        Args:
            run: It.
            multiplied_s: Seconds of it for which the GPU did not wait for its memory.
        """
        end = self._ended = run.end
        if self.machine.hot_slowdown and (took := end - run.start) > 0:
            kept = math.exp(-took / WARMING_S)
            share = min(multiplied_s / took, 1.0)
            self.heat = self.heat * kept + share * (1.0 - kept)
        if not self.ahead:
            return
        last_s = end - run.after(run.steps - 1)
        self._spare_s = last_s if self.ready else last_s - self._busy_s
        if run.steps > 1:
            # What is launched no sooner than the last outcome is seen begins then.
            last_gpu_s = run.first_s + run.growth_s * (run.steps - 1)
            self._lag_s = max(last_s - last_gpu_s, 0.0)
        else:
            self._lag_s = end - self._done
