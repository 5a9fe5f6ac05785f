"""The protocol against a network that loses, repeats, reorders and damages.

Memory is modelled: blocks are scribbled over the moment they are free, as the
next request would, so a transfer that ends well with other bytes than were
offered, or a write into blocks that somebody else has by then, is found out.
"""

import contextlib

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from llmd.errors import CircuitOpen
from llmd.transport import (
    Endpoint,
    Fetch,
    Layout,
    Offer,
    Settings,
    Side,
    TransferEnded,
    TransferId,
)
from llmd.transport.local import held, multilinear
from llmd.transport.outbox import Meet, Send, Write

BLOCKS, LAYERS = 12, 3
LAYOUT = Layout(model="m", dtype="u8", layers=LAYERS, block_tokens=1, block_bytes=8)
TUNED = Settings(
    piece_bytes=32, writes_in_flight=2, heartbeat_s=0.2, silence_s=3.0, max_attempts=3
)
KEY = b"k" * 32


class Network(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)
        self.now, self.names = 0.0, 0
        self.memory = {name: self.random_slab() for name in "AB"}
        self.ends = {name: self.endpoint(name) for name in "AB"}
        self.wires = {"A": [], "B": []}  # frames on the way to each
        self.writes: list[Write] = []  # from A to B, in flight
        self.offered: dict[TransferId, np.ndarray] = {}
        self.source_blocks: dict[TransferId, list[int]] = {}
        self.target_blocks: dict[TransferId, list[int]] = {}
        self.seen = {"A": {}, "B": {}}
        self.lossy = True
        self.ends["B"].meet("A", 0.0)
        self.settle()

    def random_slab(self):
        shape = (LAYERS, BLOCKS, LAYOUT.block_bytes)
        return self.rng.integers(0, 256, shape, dtype=np.uint8)

    def endpoint(self, name):
        def sums(first, last, blocks):
            held = self.memory[name][first:last, blocks]
            return multilinear(held.reshape(-1, LAYOUT.block_bytes))

        return Endpoint(name, KEY, LAYOUT, BLOCKS, sums, TUNED, address=name.encode())

    def settle(self):
        """Carry out what the ends want, and look at what they report."""
        for name, end in self.ends.items():
            other = "B" if name == "A" else "A"
            while end.pump() or end.outbox.effects:
                match end.outbox.effects.popleft():
                    case Send(peer=peer, frame=frame):
                        assert peer == other
                        self.wires[other].append(frame.seal(KEY, name, other))
                    case Write() as write:
                        assert name == "A"
                        self.writes.append(write)
                    case Meet():
                        pass
            while end.outbox.reports:
                self.report(name, end.outbox.reports.popleft())

    def report(self, name, report):
        kinds = self.seen[name].setdefault(report.id, [])
        kinds.append(type(report).__name__)
        assert kinds in (["TransferEnded"], ["TransferEnded", "BlocksFreed"])
        assert report.side is (Side.SOURCE if name == "A" else Side.TARGET)
        if isinstance(report, TransferEnded):
            if report.error is None and name == "B" and self.target_blocks[report.id]:
                got = self.memory["B"][:, self.target_blocks[report.id]]
                assert (got == self.offered[report.id]).all(), "wrong bytes, no error"
            return
        mine = self.source_blocks if name == "A" else self.target_blocks
        blocks = mine.pop(report.id)
        if name == "B":
            for write in self.writes:
                assert write.frame.id != report.id, "freed with a write in flight"
        else:
            # Only what flies to a peer that hangs may read blocks that are free.
            for write in self.writes:
                if write.token in self.ends["A"].sources.flying:
                    assert write.frame.id != report.id, "freed with a write in flight"
        shape = (LAYERS, len(blocks), LAYOUT.block_bytes)
        self.memory[name][:, blocks] = self.rng.integers(0, 256, shape, dtype=np.uint8)

    def free_blocks(self, held):
        taken = {block for blocks in held.values() for block in blocks}
        return [block for block in range(BLOCKS) if block not in taken]

    @rule(data=st.data(), early=st.booleans(), ready=st.booleans())
    def hand_off(self, data, early, ready):
        count = data.draw(st.integers(1, 4))
        sources = self.free_blocks(self.source_blocks)[:count]
        targets = self.free_blocks(self.target_blocks)[:count]
        met = "A" in self.ends["B"].peers
        if len(sources) < count or len(targets) < count or not met:
            return
        self.names += 1
        id = TransferId(f"r{self.names}", self.names)
        steps = [self.fetch, self.offer] if early else [self.offer, self.fetch]
        self.offered[id] = self.memory["A"][:, sources].copy()
        for step in steps:
            step(id, sources, targets, early, ready)
        if not ready:
            for layer in range(LAYERS):
                self.ends["A"].ready(id, layer)
        self.settle()

    def offer(self, id, sources, targets, early, ready):
        self.source_blocks[id] = sources
        offer = Offer(id=id, blocks=sources, ready=ready, timeout_s=4.0)
        self.ends["A"].offer(offer, self.now)

    def fetch(self, id, sources, targets, early, ready):
        fetch = Fetch(id=id, peer="A", blocks=targets, early=early, timeout_s=2.0)
        with contextlib.suppress(CircuitOpen):
            self.ends["B"].fetch(fetch, self.now)
            self.target_blocks[id] = targets

    @rule(data=st.data(), to=st.sampled_from("AB"), repeat=st.booleans())
    def deliver(self, data, to, repeat):
        if not self.wires[to]:
            return
        i = data.draw(st.integers(0, min(3, len(self.wires[to]) - 1)))
        frame = self.wires[to][i] if repeat else self.wires[to].pop(i)
        self.ends[to].heard("B" if to == "A" else "A", frame, self.now)
        self.settle()

    @rule(to=st.sampled_from("AB"))
    def lose(self, to):
        if self.wires[to]:
            self.wires[to].pop(0)

    @rule(data=st.data(), to=st.sampled_from("AB"))
    def damage_a_frame(self, data, to):
        if self.wires[to]:
            frame = bytearray(self.wires[to].pop(0))
            at = data.draw(st.integers(0, len(frame) - 1))
            frame[at] ^= 1
            forged = self.ends[to].outbox.counts["forged"]
            self.ends[to].heard("B" if to == "A" else "A", bytes(frame), self.now)
            assert self.ends[to].outbox.counts["forged"] == forged + 1
            self.settle()

    @rule(data=st.data(), damage=st.booleans())
    def land(self, data, damage):
        if not self.writes:
            return
        write = self.writes.pop(data.draw(st.integers(0, len(self.writes) - 1)))
        self.copy(write)
        if damage:
            last = write.layer + write.layers - 1
            self.memory["B"][last, write.target[0], 3] ^= 0x10
        self.wires["B"].append(write.frame.seal(KEY, "A", "B"))
        self.ends["A"].wrote(write.token, None, self.now)
        self.settle()

    def copy(self, write):
        taken = [b for bs in self.target_blocks.values() for b in bs]
        assert np.isin(write.target, taken).all(), "a write into blocks that are free"
        layers = slice(write.layer, write.layer + write.layers)
        source = self.memory["A"][layers, write.source]
        self.memory["B"][layers, write.target] = source

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0]))
    def wait(self, seconds):
        self.now += seconds
        for end in self.ends.values():
            end.tick(self.now)
        self.settle()

    @rule(data=st.data(), name=st.sampled_from("AB"))
    def cancel(self, data, name):
        mine = self.source_blocks if name == "A" else self.target_blocks
        if mine:
            id = data.draw(st.sampled_from(sorted(mine, key=lambda id: id.generation)))
            self.ends[name].cancel(id, "cancelled", self.now)
            self.settle()

    @invariant()
    def what_is_held_is_counted(self):
        for name, end in self.ends.items():
            mine = self.source_blocks if name == "A" else self.target_blocks
            counts = held(end)
            kind = "offers" if name == "A" else "fetches"
            assert counts[kind] == len(mine)
        taken = {b for bs in self.target_blocks.values() for b in bs}
        assert self.ends["B"].targets.taken == taken

    def teardown(self):
        """On a network that works again everything ends and nothing is held."""
        for _ in range(60):
            while self.writes:
                write = self.writes.pop(0)
                self.copy(write)
                self.wires["B"].append(write.frame.seal(KEY, "A", "B"))
                self.ends["A"].wrote(write.token, None, self.now)
                self.settle()
            for to in "AB":
                frames, self.wires[to] = self.wires[to], []
                for frame in frames:
                    self.ends[to].heard("B" if to == "A" else "A", frame, self.now)
                    self.settle()
            self.now += 0.5
            for end in self.ends.values():
                end.tick(self.now)
            self.settle()
        for name in "AB":
            assert all(len(kinds) == 2 for kinds in self.seen[name].values())
        assert not self.source_blocks
        assert not self.target_blocks
        for end in self.ends.values():
            counts = held(end)
            assert not counts["writes"]
            assert not counts["quarantined_blocks"]


TestNetwork = Network.TestCase
TestNetwork.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
