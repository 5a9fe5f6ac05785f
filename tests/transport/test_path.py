"""What UCX says of its choices, in the layouts it says it in."""

import os
import subprocess
import sys
import textwrap

import pytest

from llmd.adapters.nixl.path import PathLog, parse

OURS = os.getpid()
SELF = """
| 4c89b5d476da40c2a15b23f2900b0d9 self cfg#0               |
| remote memory write by ucp_put* from host memory to host |
+--------+-------------+-----------------------------------+
| Range  | Description |              Config               |
| 0..inf | zero-copy   | tcp/lo                            |
"""
HOST = SELF.replace("self cfg#0", "intra-node cfg#1").replace("tcp/lo", "cma/memory")
NARROW = """
| agent intra-node cfg#2                                     |
| remote memory write by ucp_put* from cuda/GPU0 to cuda/GPU0 |
| 0..inf | zero-copy   | cuda_ipc/cuda                      |
"""
WIDE = """
| agent intra-node cfg#2 | remote memory write by ucp_put*(multi) \
from cuda/GPU0 to cuda/dev[0] |
|                      0 | short     | cuda_ipc/cuda |
|                 1..inf | zero-copy | cuda_ipc/cuda |
"""
FALLEN_BACK = """
| agent inter-node cfg#3 | remote memory write by ucp_put*(multi) \
from cuda/GPU0 to cuda |
|                 0..inf | software emulation | tcp/eth0 |
"""


def logged(tables, process=OURS):
    lines = tables.strip().splitlines()
    return "".join(f"[1795.1] [vm:{process:<5}:0]   {line}\n" for line in lines)


@pytest.fixture
def log(tmp_path):
    log = PathLog(tmp_path / f"ucx-{OURS}.log")
    assert not log.paths()
    return log


@pytest.mark.parametrize("table", [NARROW, WIDE])
def test_a_gpu_s_way_is_read_in_both_layouts(log, table):
    log.file.write_text(logged(SELF + HOST + table))
    assert log.write_path("VRAM").lanes == "cuda_ipc/cuda"
    assert log.write_path("VRAM").between == "intra-node"
    assert log.write_path("DRAM").lanes == "cma/memory"


def test_a_gpu_that_fell_back_is_slow(log):
    log.file.write_text(logged(WIDE + FALLEN_BACK))
    path = log.write_path("VRAM")
    assert path.slow
    assert path.between == "inter-node"


def test_the_way_to_oneself_is_no_way_to_a_peer(log):
    log.file.write_text(logged(HOST + SELF))
    assert log.write_path("DRAM").lanes == "cma/memory"
    log.file.write_text(logged(SELF))
    assert log.write_path("DRAM") is None


def test_what_another_process_wrote_there_is_not_ours(log):
    log.file.write_text(logged(HOST) + logged(FALLEN_BACK, OURS + 1))
    assert log.write_path("VRAM") is None
    assert [path.lanes for path in log.paths()] == ["cma/memory"]


def test_of_several_lanes_one_by_tcp_is_enough_to_be_slow():
    table = HOST.replace("cma/memory", "50% on rc_mlx5/a and 50% on tcp/eth0")
    assert parse(logged(table), OURS)[0].slow
    assert not parse(logged(HOST), OURS)[0].slow


def test_each_process_has_a_log_of_its_own(tmp_path):
    log = PathLog(tmp_path / "ucx-%p.log")
    (tmp_path / f"ucx-{OURS}.log").write_text(logged(HOST, 7) + logged(WIDE))
    assert log.write_path("VRAM").lanes == "cuda_ipc/cuda"
    assert log.write_path("DRAM") is None


def test_logs_are_gone_with_the_processes_that_wrote_them(tmp_path):
    """Those of a child too, which ends as engines do."""
    pytest.importorskip("nixl")
    script = """
        import glob, multiprocessing, os, tempfile
        from llmd.adapters.nixl import NixlTransport, Slab
        from llmd.transport import Layout

        def use():
            layout = Layout(
                model="m", dtype="u8", layers=1, block_tokens=1, block_bytes=8
            )
            NixlTransport(Slab.allocate(layout, 4), b"k" * 32).close()
            mine = glob.glob(f"{tempfile.gettempdir()}/llmd-ucx-*-{os.getpid()}.log")
            assert mine, "UCX has written one"

        if __name__ == "__main__":
            use()
            child = multiprocessing.get_context("spawn").Process(target=use)
            child.start()
            child.join()
            assert child.exitcode == 0
    """
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(script))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("UCX_LOG_FILE", None)
    subprocess.run([sys.executable, file], check=True, env=environment, timeout=120)
    assert not list(tmp_path.glob("llmd-ucx-*"))
