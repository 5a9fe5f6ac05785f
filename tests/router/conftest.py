import numpy as np
import pytest

import llmd
from llmd import Tier
from llmd.view import View


class Stub:
    """A moment of a fleet, written down: what each worker runs and holds."""

    def __init__(self, now=100.0, **columns):
        workers = len(next(iter(columns.values())))
        self.facts = tuple(
            llmd.Worker(id=f"w{row}", block_tokens=16, kv_blocks=1000)
            for row in range(workers)
        )
        self.held = np.zeros((workers, len(Tier)), dtype=np.int64)
        for tier in Tier:
            for slower in range(tier, len(Tier)):
                more = columns.get(tier.name, [0] * workers)
                self.held[:, slower] = np.maximum(self.held[:, slower], more)
        kinds = llmd.view.COLUMNS
        given = {
            name: np.array(
                columns.get(name, [np.nan if kind is np.float64 else 0] * workers),
                dtype=kind,
            )
            for name, kind in kinds.items()
        }
        given["block_tokens"][:], given["kv_blocks"][:] = 16, 1000
        self.view = View(
            now=now,
            rng=np.random.default_rng(0),
            workers=llmd.Workers(
                ids=tuple(fact.id for fact in self.facts),
                facts=self.facts,
                states=(llmd.State.READY,) * workers,
                **given,
            ),
            waiting=(),
            match=lambda request, ids, at: self.held,
        )


@pytest.fixture
def stub():
    return Stub


@pytest.fixture
def ask():
    def make(tokens=160, **names):
        return llmd.Request(id="r", prompt=range(tokens), **names)

    return make
