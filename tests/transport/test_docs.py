"""The how-to's transport runs, and prints what it says it prints."""

import re
from pathlib import Path

import pytest

pytest.importorskip("nixl")
pytest.importorskip("xxhash")

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "disaggregate.md"


def test_the_how_to_moves_blocks(capsys):
    found = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    (block,) = [text for text in found if "NixlTransport" in text]
    (said,) = re.findall(r"# (None \d+)$", block, re.M)
    exec(block, {})
    assert said in capsys.readouterr().out
