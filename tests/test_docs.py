"""What the documentation shows is Python that runs, page by page.

Blocks of a page run one after the other, with what those before have defined and
what the page takes for granted.  Of those that need engines only the imports are
looked up; the tests of `vllm` and `transport` run their like.
"""

import ast
import json
import re
import shutil
import time
from pathlib import Path

import pytest

import llmd
from llmd.live import Server
from llmd.sim import Calibration

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).with_name("data")
PAGES = {
    page.name: page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "```python" in page.read_text()
}


def blocks(name):
    return re.findall(r"^```python\n(.*?)^```", PAGES[name].read_text(), re.S | re.M)


@pytest.mark.parametrize("name", PAGES)
def test_all_is_python_and_what_is_imported_is_there(name):
    for text in blocks(name):
        compile(text, name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("llmd"):
                exec(compile(ast.Module([node], []), name, "exec"), {})


def tutorial():
    trace = DATA / "mooncake_conversation_300.jsonl"
    shutil.copy(trace, "conversation_trace.jsonl")
    return {}


def calibrated():
    found = json.loads((DATA / "h200_cells_3.json").read_text())[0]
    Calibration.of(found).save("mine.json")
    return {}


def own_loop():
    return {
        "now": time.monotonic,
        "tokens": [1, 2, 3],
        "worker": "http://10.0.0.7:8000",
        "send": lambda request, worker: None,
    }


RUN = {
    "README.md": ([0], dict),
    "own-policy.md": ([0, 1, 2, 3, 4, 5], tutorial),
    "write-a-router.md": (
        [0, 1, 2, 3, 4],
        lambda: {"server": Server(llmd.Cluster())},
    ),
    "calibrate.md": ([1, 2], calibrated),
    "queue.md": ([0, 1], lambda: {"llmd": llmd, "cluster": llmd.Cluster()}),
    "lease.md": ([1], own_loop),
    "autoscale.md": (
        [1, 2, 5],
        lambda: {"TargetConcurrency": llmd.autoscaler.TargetConcurrency},
    ),
    "simulator.md": ([0], dict),
}


@pytest.mark.parametrize("name", RUN)
def test_it_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    numbers, taken_for_granted = RUN[name]
    names, found = taken_for_granted(), blocks(name)
    for number in numbers:
        exec(compile(found[number], f"{name}[{number}]", "exec"), names)
