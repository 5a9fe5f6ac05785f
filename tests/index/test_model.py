"""The index does what plain sets of names would do, whatever happens."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import llmd
from llmd import Tier
from llmd.index import dump, restore

# Prompts that share beginnings, so that workers hold parts of one another.
COMMON = list(range(100, 148))
PROMPTS = [
    [*COMMON[:cut], *range(start, start + length)]
    for cut, start, length in [
        (0, 1, 40), (16, 2, 60), (32, 3, 80), (48, 4, 8), (48, 5, 70), (48, 5, 20),
    ]
]  # fmt: skip
SALTS = ["", "x"]
IDS = [f"w{number}" for number in range(5)]


class SetModel:
    """What each worker holds in each tier, as sets of names."""

    def __init__(self):
        self.sizes: dict[str, int] = {}
        self.held: dict[tuple[str, Tier], set[int]] = {}

    def of(self, worker, tier):
        return self.held.setdefault((worker, tier), set())

    def drop(self, worker):
        for tier in Tier:
            self.of(worker, tier).clear()

    def depth(self, request, worker, slowest):
        names = request.hashes(self.sizes[worker]).tolist()
        count = 0
        for name in names:
            if not any(name in self.of(worker, tier) for tier in range(slowest + 1)):
                break
            count += 1
        return count * self.sizes[worker]


class IndexMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.index = llmd.ExactIndex(grace=0.0)
        self.model = SetModel()
        self.now = 0.0
        self.requests = [
            llmd.Request(id=f"{number}{salt}", prompt=prompt, salt=salt)
            for number, prompt in enumerate(PROMPTS)
            for salt in SALTS
        ]

    def draw_worker(self, data):
        known = sorted(self.model.sizes)
        return data.draw(st.sampled_from(known)) if known else None

    @rule(worker=st.sampled_from(IDS), size=st.sampled_from([8, 16]))
    def join(self, worker, size):
        if worker not in self.model.sizes:
            self.index.join(llmd.Worker(id=worker, block_tokens=size), self.now)
            self.model.sizes[worker] = size

    @rule(data=st.data(), tier=st.sampled_from(Tier), part=st.floats(0, 1))
    def store(self, data, tier, part):
        """An engine stores from the head on, in the tier or a faster one."""
        worker = self.draw_worker(data)
        if worker is None:
            return
        request = data.draw(st.sampled_from(self.requests))
        size = self.model.sizes[worker]
        names = request.hashes(size)
        names = names[: round(part * len(names))]
        self.index.store(worker, names, size, tier, self.now)
        self.model.of(worker, tier).update(names.tolist())

    @rule(data=st.data(), part=st.floats(0, 1))
    def evict(self, data, part):
        """An engine drops the tail of a prompt, and what hangs on it, everywhere."""
        worker = self.draw_worker(data)
        if worker is None:
            return
        size = self.model.sizes[worker]
        doomed = set()
        victim = data.draw(st.sampled_from(self.requests)).hashes(size)
        gone = victim[round(part * len(victim)) :].tolist()
        for request in self.requests:
            names = request.hashes(size).tolist()
            cuts = [place for place, name in enumerate(names) if name in gone]
            if cuts:
                doomed.update(names[cuts[0] :])
        for tier in Tier:
            names = np.array(sorted(doomed), dtype=np.uint64)
            self.index.remove(worker, names, tier, self.now)
            self.model.of(worker, tier).difference_update(doomed)

    @rule(data=st.data(), reason=st.sampled_from(["", "batches 3 to 4 are lost"]))
    def clear_or_gap(self, data, reason):
        worker = self.draw_worker(data)
        if worker is not None:
            drop = self.index.doubt if reason else self.index.forget
            drop(worker, reason, self.now)
            self.model.drop(worker)

    @rule(data=st.data(), size=st.sampled_from([8, 16]))
    def restart(self, data, size):
        """A worker leaves and one of the same name comes at once."""
        worker = self.draw_worker(data)
        if worker is not None:
            self.index.leave(worker, self.now)
            self.model.drop(worker)
            self.model.sizes[worker] = size
            self.index.join(llmd.Worker(id=worker, block_tokens=size), self.now)

    @rule(data=st.data())
    def send(self, data):
        """What is hoped for is gone at once here: the grace is nothing."""
        worker = self.draw_worker(data)
        if worker is not None:
            request = data.draw(st.sampled_from(self.requests))
            self.index.expect(worker, request, self.now)
            end = data.draw(st.sampled_from([self.index.settle, self.index.revoke]))
            if end == self.index.settle:
                end(worker, request, None, self.now)
            else:
                end(worker, request, self.now)

    @rule()
    def reload(self):
        """Nothing is lost on the way through a dump."""
        restored = restore(dump(self.index))
        restored.grace = 0.0
        for worker, size in self.model.sizes.items():
            restored.join(llmd.Worker(id=worker, block_tokens=size), self.now)
        self.index = restored

    @invariant()
    def same_as_sets(self):
        self.index.check()
        workers = tuple(sorted(self.model.sizes))
        for request in self.requests:
            held = self.index.match(request, workers, self.now)
            assert held.shape == (len(workers), len(Tier))
            for row, worker in enumerate(workers):
                want = [self.model.depth(request, worker, tier) for tier in Tier]
                assert held[row].tolist() == want


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
