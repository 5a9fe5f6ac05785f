"""Importing llmd brings what it says and nothing heavy, whatever is installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
HEAVY = ("asyncio", "torch", "vllm", "nixl", "zmq", "ray", "starlette", "matplotlib")


def imported(statement):
    code = f"import sys; {statement}; print(*sys.modules, sep='\\n')"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(ran.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import llmd",
        "import llmd; llmd.Cluster()",
        "from llmd import *",
        "import llmd.sim",
    ],
)
def test_nothing_heavy(statement):
    assert not imported(statement) & set(HEAVY)


def test_a_cluster_needs_no_policy_that_is_not_named():
    modules = imported("import llmd; llmd.Cluster()")
    assert "llmd.cluster" in modules
    assert not {"llmd.sim", "llmd.live", "llmd.balancer.bands"} & modules


def test_every_name_of_every_face_is_there():
    for package in ("", ".router", ".balancer", ".autoscaler", ".machines"):
        imported(f"from llmd{package} import *")


def test_a_function_wins_over_its_module():
    from llmd.machines import detect

    assert callable(detect)


def test_an_unknown_name_is_an_attribute_error():
    import llmd

    with pytest.raises(AttributeError, match="nothing"):
        llmd.nothing  # noqa: B018


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name
)
def test_examples_import_what_there_is(path):
    """Also of those that only run where there are engines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level:
            continue
        if not (node.module or "").startswith("llmd"):
            continue
        if ".adapters." in f"{node.module}.":
            continue
        names = ", ".join(name.name for name in node.names)
        exec(f"from {node.module} import {names}", {})


def test_a_plot_without_its_extra_is_refused_before_the_run():
    run = f"runpy.run_path({str(EXAMPLES / 'autoscale.py')!r}, run_name='__main__')"
    code = f"import runpy, sys; sys.modules['matplotlib'] = None; {run}"
    asked = [sys.executable, "-c", code, "--plot", "course.png"]
    ran = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "llmd-scheduler[plot]" in ran.stderr
