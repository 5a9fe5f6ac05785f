"""The README's server answers, with a model that needs no hub."""

import ast
import re
from pathlib import Path

import pytest

pytest.importorskip("vllm")
from llmd.adapters.vllm.tiny import make_model

README = Path(__file__).parents[2] / "README.md"
MODEL = '"Qwen/Qwen2.5-7B-Instruct"'


async def test_the_readme_answers(tmp_path, capsys):
    found = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.S | re.M)
    simulated, live = found
    names: dict[str, object] = {}
    exec(simulated, names)
    assert "CachedAndIdle" in capsys.readouterr().out
    assert MODEL in live
    mine = live.replace(MODEL, repr(str(make_model(tmp_path / "tiny"))))
    code = compile(mine, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    await eval(code, names)
    assert capsys.readouterr().out.strip()
