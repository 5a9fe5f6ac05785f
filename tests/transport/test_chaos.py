"""500 hand-offs between two real processes under random faults.

Each ends with the right bytes or with an error, and nothing is held afterwards.
"""

import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nixl")
pytest.importorskip("xxhash")

sys.path.insert(0, str(Path(__file__).parent))

import peer as p

from llmd.errors import TransferError
from llmd.transport import (
    BlocksFreed,
    Fetch,
    Offer,
    TransferEnded,
    TransferId,
)

HAND_OFFS = 500
AT_ONCE = 6
KILLS, STOPS = 3, 3
REFUSED_S = 0.05
"""Between two tries while a circuit is open, or most are spent on a slow machine."""


class Chaos:
    """Targets here, sources in a process that is hurt again and again."""

    def __init__(self, rng, mapped):
        self.rng, self.mapped = rng, mapped
        slab = p.slab_of(np.zeros_like(p.fill(0)), mapped)
        self.slab, self.here = slab.owner, p.transport(slab)
        self.free = set(range(p.BLOCKS))
        self.open: dict[TransferId, tuple] = {}
        self.outcomes = Counter()
        self.lives = 0
        self.restart()

    def restart(self):
        self.lives += 1
        # Every life has other bytes, and damages some writes on the way.
        self.peer = p.PeerProcess(seed=self.lives, damaged=5, mapped=self.mapped)

    def start(self, number):
        count = self.rng.randrange(1, 6)
        while len(self.free) < count:
            self.collect()
            time.sleep(1e-3)
        source = self.rng.sample(range(p.BLOCKS), count)
        target = self.rng.sample(sorted(self.free), count)
        id = TransferId.fresh(f"r{number}")
        lost = self.rng.random() < 0.1
        if not lost:
            self.peer.do("offer", Offer(id=id, blocks=source, timeout_s=5.0))
        try:
            name = self.here.connect(self.peer.address)
            self.here.fetch(
                Fetch(
                    id=id,
                    peer=name,
                    blocks=target,
                    early=self.rng.random() < 0.5,
                    timeout_s=self.rng.choice([0.02, 1.0, 5.0]),
                )
            )
        except TransferError as error:
            self.outcomes[type(error).__name__] += 1
            time.sleep(REFUSED_S)
            return
        self.free -= set(target)
        self.open[id] = (source, target, self.peer.slab)
        if self.rng.random() < 0.1:
            self.here.cancel(id, "the client went away")
        if self.rng.random() < 0.05:
            self.peer.do("cancel", id)

    def collect(self):
        for report in self.here.poll():
            if isinstance(report, BlocksFreed):
                _, target, _ = self.open.pop(report.id)
                self.slab[:, target] = 0
                self.free |= set(target)
            elif isinstance(report, TransferEnded):
                source, target, slab = self.open[report.id]
                if report.error is None:
                    assert (self.slab[:, target] == slab[:, source]).all()
                    self.outcomes["right"] += 1
                else:
                    self.outcomes["error"] += 1


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "nixl"])
def test_every_hand_off_ends_and_nothing_is_held(mapped):
    rng = random.Random(0)
    chaos = Chaos(rng, mapped)
    faults = dict.fromkeys(rng.sample(range(50, HAND_OFFS), KILLS), "kill")
    faults |= dict.fromkeys(rng.sample(range(50, HAND_OFFS), STOPS), "stop")
    try:
        for number in range(HAND_OFFS):
            chaos.start(number)
            fault = faults.get(number)
            if fault == "kill":
                chaos.peer.kill()
                chaos.restart()
            elif fault == "stop":
                chaos.peer.signal(signal.SIGSTOP)
                time.sleep(p.QUICK.silence_s * 1.5)
                chaos.peer.signal(signal.SIGCONT)
            while len(chaos.open) >= AT_ONCE:
                chaos.collect()
                time.sleep(1e-3)
        p.wait_for(lambda: chaos.collect() or not chaos.open, 60.0)
        assert sum(chaos.outcomes.values()) == HAND_OFFS
        assert chaos.outcomes["right"] > HAND_OFFS / 3, chaos.outcomes
        assert chaos.outcomes["error"] > 0
        assert len(chaos.free) == p.BLOCKS
        counts = chaos.here.counts
        assert not counts["fetches"] + counts["writes"] + counts["quarantined_blocks"]
        p.wait_for(lambda: not chaos.peer.do("counts")["offers"], 20.0)
        assert not chaos.peer.do("counts")["writes"]
    finally:
        chaos.here.close()
        chaos.peer.kill()
