"""The examples of the simulator run as they stand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout


def test_ten_lines():
    lines = (EXAMPLES / "ten_lines.py").read_text().splitlines()
    assert len([line for line in lines[1:] if line.strip()]) <= 10
    out = run(EXAMPLES / "ten_lines.py")
    assert "CachedAndIdle" in out


def test_leaderboard(sample):
    out = run(EXAMPLES / "leaderboard.py", "--requests", "60", "--seeds", "1")
    assert len(out.splitlines()) == 17
    out = run(EXAMPLES / "leaderboard.py", "--requests", "60", "--trace", sample)
    assert "LeastDelay" in out


def test_every_cell_of_the_notebook():
    pytest.importorskip("matplotlib")
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text())
    names = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 8
    for cell in cells:
        assert not cell["outputs"]
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["report"].completed == 400
