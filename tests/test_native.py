"""The compiled loops do what their twins in Python do."""

import copy
import gc
import os
import pickle
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import attrs
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

import llmd
from llmd.errors import InvalidRequest
from llmd.hashing import Hasher, token_array
from llmd.index.holders import LoggedHolders, PlainHolders
from llmd.index.seats import Rows
from llmd.native import loops
from llmd.router import delay

PURE = os.environ.get("LLMD_PURE", "") not in ("", "0")
compiled = pytest.mark.skipif(loops is None, reason="no compiled loops here")


@pytest.mark.skipif(PURE or shutil.which("cc") is None, reason="not to be built")
def test_they_are_built_where_a_compiler_is():
    assert loops is not None


def test_a_change_of_any_header_builds_them_anew():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    [module] = project["tool"]["setuptools"]["ext-modules"]
    headers = (root / "src/llmd/native").glob("*.h")
    names = [f"src/llmd/native/{header.name}" for header in headers]
    assert sorted(module["depends"]) == sorted(names)


def test_they_can_be_left_out():
    code = "from llmd.native import loops; from llmd import Request; print(loops)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LLMD_PURE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert run.stdout == "None\n"


# Names ------------------------------------------------------------------------


@compiled
@given(
    st.lists(st.integers(0, 2**63 - 1), max_size=80),
    st.integers(1, 20),
    st.integers(0, 500),
    st.integers(0, 2**64 - 1),
    st.sampled_from(["list", "array", "every second"]),
)
def test_names_are_those_of_numpy(tokens, block_tokens, start_tokens, start, form):
    hasher = Hasher(bytes(16))
    given = tokens
    if form == "array":
        given = np.array(tokens, np.uint64)
    elif form == "every second":
        given = np.repeat(np.array(tokens, np.uint64), 2)[::2]
    names = hasher.hashes(given, block_tokens, start_tokens, start)
    want = hasher._in_numpy(tokens, block_tokens, start_tokens, start)
    assert names.tolist() == want.tolist()


@pytest.mark.parametrize(
    "tokens",
    [
        [1.5],
        ["a"],
        [-1],
        [2**64],
        [2**64 - 1],
        np.array([3, -1]),
        [None],
        [[1]],
        (3, -(2**70)),
    ],
)
def test_what_is_no_token_is_refused(tokens):
    with pytest.raises(InvalidRequest):
        token_array(tokens)


@pytest.mark.parametrize(
    "tokens", [[5, 2**63 - 1], (5, 6), [np.int64(7), True], range(3), []]
)
def test_tokens_of_every_kind_are_taken(tokens):
    assert token_array(tokens).tolist() == [int(token) for token in tokens]


@compiled
def test_bad_arguments_are_refused_and_nothing_is_written():
    weights, out = np.ones(8, np.uint64), np.zeros(1, np.uint64)
    for bad in (
        ([1, 2, 3], weights, 6, 0, 1, out),  # a coefficient short
        ([1, 2, 3], weights, -1, 0, 1, None),
        ([1, 2, 3], weights, 0, 0, 0, None),
        ([1, 2, 3], [1] * 8, 0, 0, 1, None),
        ([1, 2, 3], weights, 0, 0, 1, out),  # room for one of three
        ([1, 2, 3], weights, 0, -1, 1, None),
    ):
        with pytest.raises((ValueError, OverflowError)):
            loops.fold(*bad)
    for bad in (([1], weights), (np.ones(3, np.int32), weights, 0, 0, 1, None)):
        with pytest.raises(TypeError):
            loops.fold(*bad)
    assert not out.any()


# Sets of workers --------------------------------------------------------------

ROWS = Rows((), {1 << seat: seat for seat in range(200)})


def raised(table, names, alive, others=()):
    """Return the tokens that each of 200 workers holds."""
    held = np.zeros((200, 1), np.int64)
    table.raise_to(names, alive, others, held, ROWS.view, 1, 1 << 40, 0)
    return held[:, 0].tolist()


WORKERS = 140
NAMES = 24
bits = st.integers(0, WORKERS - 1).map(lambda seat: 1 << seat)
runs = st.tuples(st.integers(0, NAMES - 1), st.integers(0, NAMES)).map(
    lambda run: [*range(run[0], min(sum(run), NAMES))]
)
steps = st.one_of(
    st.tuples(st.just("add"), bits, runs),
    st.tuples(st.just("discard"), bits, runs),
    st.tuples(st.just("trim"), st.integers(0, NAMES)),
)


@compiled
@given(st.lists(steps, max_size=60))
def test_a_table_is_a_dict_of_sets(history):
    table, plain = loops.Table(), PlainHolders()
    for name, *arguments in history:
        if name == "trim" and arguments[0] > len(plain):
            continue
        done = getattr(table, name)(*arguments), getattr(plain, name)(*arguments)
        assert done[0] == done[1]
        assert table.items() == [*plain.items()]
        assert len(table) == len(plain)
    for place in range(NAMES):
        assert table.find(place, -1) == plain.find(place, -1)


@compiled
@settings(max_examples=200)
@given(
    st.lists(st.integers(0, NAMES), max_size=WORKERS),
    st.lists(st.integers(0, NAMES), max_size=WORKERS),
    st.integers(0, 2**WORKERS - 1),
    st.integers(0, 3),
    st.integers(1, NAMES),
)
def test_depths_are_those_of_the_plain_search(depths, slower, alive, first, fine):
    names = np.arange(NAMES, dtype=np.uint64)
    tables = [loops.Table(), loops.Table()]
    plains = [PlainHolders(), PlainHolders()]
    for held, table, plain in zip((depths, slower), tables, plains, strict=True):
        for seat, depth in enumerate(held):
            table.add(1 << seat, names[:depth])
            plain.add(1 << seat, names[:depth])
    others, plain_others = (tables[1],), (plains[1],)
    rows = Rows(range(50), {1 << (2 * row): row for row in range(50)})
    held, want = rows.nothing(), rows.nothing()
    held[3] = want[3] = 100
    tables[0].raise_to(names, alive, others, held, rows.view, 7, fine, first)
    plains[0].reach(
        *(names, alive, rows, want, 7), fine=fine, tier=first, others=plain_others
    )
    assert held.tolist() == want.tolist()


@given(st.lists(steps, max_size=40))
def test_an_index_can_be_copied_and_sent_elsewhere(history):
    index = LoggedHolders()
    for name, *arguments in history:
        if name == "add":
            index.add(*arguments)
        elif name == "discard":
            index.drop(*arguments)
    for twin in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        assert [*twin.items()] == [*index.items()]
        for seat in range(WORKERS):
            assert [*twin.names(1 << seat)] == [*index.names(1 << seat)]
        before = [*index.items()]
        twin.add(1 << 3, [10_000])
        twin.clear(1 << 3)
        twin.sweep(1000)
        assert [*index.items()] == before
    assert pickle.loads(pickle.dumps(Hasher(bytes(16)))).key == bytes(16)


@compiled
def test_a_state_that_makes_no_sense_does_no_harm():
    good = loops.Table()
    good.add(1, [1, 2])
    words, rows, names, sets = good.state()
    for state in (
        (0, rows, names, sets),
        (words, b"", names, sets),
        (words, rows, names, sets[:4]),
    ):
        with pytest.raises(ValueError, match="state"):
            loops.Table().restore(state)
    strange = loops.Table()
    strange.restore((words, rows, names, b"\xff" * 8))
    assert len(strange) == 0


@compiled
def test_a_table_refuses_what_makes_no_sense():
    table = loops.Table()
    for call, error in (
        (lambda: table.add(0, [1]), ValueError),
        (lambda: table.add(-1, [1]), ValueError),
        (lambda: table.add(1, [-1]), OverflowError),
        (lambda: table.add(1, ["a"]), TypeError),
        (lambda: table.add(1, 5), TypeError),
        (lambda: raised(table, [1], 1), TypeError),
        (lambda: raised(table, np.ones(1, np.uint64), 1, (PlainHolders(),)), TypeError),
        (lambda: table.find("a", 0), TypeError),
    ):
        with pytest.raises(error):
            call()
    assert len(table) == 0


@compiled
def test_memory_is_a_fraction_of_a_dicts():
    table = loops.Table()
    for seat in range(4):
        table.add(1 << seat, np.arange(100_000, dtype=np.uint64))
    assert sys.getsizeof(table) / 100_000 < 40
    for seat in range(4):
        table.discard(1 << seat, np.arange(100_000, dtype=np.uint64))
    table.add(1, np.arange(200_000, dtype=np.uint64))
    assert table.items()[0] == (0, 1)
    assert len(table) == 200_000


# Delays -----------------------------------------------------------------------

GRAPHS = {"graph_tokens": 800.0, "graph_floor_s": 0.5}


@compiled
@given(
    st.integers(0, 12).flatmap(
        lambda workers: st.tuples(
            arrays(np.int64, (4, workers), elements=st.integers(0, 10**6)),
            arrays(np.int64, (workers, 4), elements=st.integers(0, 3000)),
        )
    ),
    st.integers(1, 4000),
    st.lists(st.floats(0.0, 10.0), min_size=4, max_size=4),
    st.sampled_from([{}, {"knee": 1.7}, {"prefix_s_per_token": 1.7}, GRAPHS]),
)
def test_delays_are_those_of_numpy(columns, tokens, weights, changed):
    loads, held = columns
    held = np.maximum.accumulate(held, axis=1)
    machine = attrs.evolve(llmd.Machine(), **changed)
    names = ("always", "waiting_here", "waiting_anywhere", "answering_here")
    router = llmd.LeastDelay(machine, **dict(zip(names, weights, strict=True)))
    request = llmd.Request(id="r", prompt=np.zeros(tokens, np.int64))
    asked = loads, held, request, router._figures(machine)
    (rows, slower), (want, also) = delay._compiled(*asked), delay._in_numpy(*asked)
    assert slower == also
    np.testing.assert_allclose(rows, want, rtol=1e-9, atol=1e-300)


@compiled
def test_delays_of_what_does_not_fit_together_are_refused():
    good = (np.zeros((4, 3), np.int64), np.zeros((3, 4), np.int64), 5.0)
    figures, out = (1.0,) * 14, np.zeros((8, 3))
    loops.delays(*good, figures, out)
    for place, bad in (
        (0, np.zeros((4, 2), np.int64)),
        (0, np.zeros(12, np.int64)),
        (1, np.zeros((3, 0), np.int64)),
        (4, np.zeros((7, 3))),
        (4, np.zeros((8, 3), np.int32)),
    ):
        given = [*good, figures, out]
        given[place] = bad
        with pytest.raises(ValueError, match="fit together"):
            loops.delays(*given)
    with pytest.raises(TypeError):
        loops.delays(*good, figures[:3], out)


@compiled
def test_workers_are_plain_ints():
    class Own(int):
        def to_bytes(self, *given, **more):
            return "nothing"

    table, names = loops.Table(), np.arange(4, dtype=np.uint64)
    table.add(1 << 100, names)
    for call in (
        lambda: table.add(Own(1 << 90), names),
        lambda: raised(table, names, Own(1 << 90)),
        lambda: raised(table, names, True),
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(ValueError, match="below 0"):
        raised(table, names, -1)


@compiled
def test_a_table_may_be_asked_while_it_answers():
    """What collects garbage in between has the same table answer, and grow."""
    table, names = loops.Table(), np.arange(64, dtype=np.uint64)
    for seat in range(200):
        table.add(1 << seat, names[: seat % 64 + 1])
    want = raised(table, names, (1 << 200) - 1)
    assert want == [seat % 64 + 1 for seat in range(200)]
    asked = []

    class Last:
        def __del__(self):
            asked.append(raised(table, names, (1 << 130) - 1))
            table.add(1 << (300 + len(asked)), names)

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(50):
            cycle = Last()
            cycle.self = cycle
            del cycle
            assert raised(table, names, (1 << 200) - 1) == want
    finally:
        gc.set_threshold(*threshold)
    assert asked


@compiled
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30))
def test_what_is_kept_of_a_log_is_each_name_once(history):
    table, plain, log = loops.Table(), PlainHolders(), []
    for name, adds in history:
        for holders in (table, plain):
            (holders.add if adds else holders.discard)(1 << 70, [name])
        log.append(name)
    assert table.kept(1 << 70, log) == plain.kept(1 << 70, log)
    assert table.kept(1 << 200, log) == b""
