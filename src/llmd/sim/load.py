"""What each worker of a run did."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np

from ..types import WorkerId
from ..view import Floats

if TYPE_CHECKING:
    from .worker import ModelWorker

NO_RUNS: Floats = np.zeros((0, 7))


@attrs.frozen(kw_only=True, eq=False, repr=False)
class WorkerLoad:
    """What one worker did.

    Attributes:
        id: Its id.
        joined_at: When it joined, seconds.
        left_at: When it left, or the run ended.
        busy_s: Seconds in steps.
        prompt_tokens: Computed, cached ones not counted.
        output_tokens: Generated.
        preemptions: Requests it threw out for want of blocks.
        runs: Shape (n, 7): start, end, steps, decoding requests, prompt
            tokens, blocks in use, requests waiting, of each run of steps.
        kv_blocks: Blocks its cache holds.
        modelled: Its engine was a model.  Of a real one only times between
            tokens are known, a run each, which overlap.
    """

    id: WorkerId
    joined_at: float
    left_at: float
    busy_s: float
    prompt_tokens: int
    output_tokens: int
    preemptions: int
    runs: Floats
    kv_blocks: int
    modelled: bool = True

    @classmethod
    def of(cls, model: ModelWorker, joined_at: float, left_at: float) -> WorkerLoad:
        """Return what a model did, from its log."""
        runs = np.array(model.log, dtype=np.float64) if model.log else NO_RUNS
        return cls(
            id=model.worker.id,
            joined_at=joined_at,
            left_at=max(left_at, joined_at),
            busy_s=float((runs[:, 1] - runs[:, 0]).sum()),
            prompt_tokens=int(runs[:, 4].sum()),
            output_tokens=int((runs[:, 2] * runs[:, 3]).sum()) + model.begun,
            preemptions=model.preemptions,
            runs=runs,
            kv_blocks=model.worker.kv_blocks,
        )
