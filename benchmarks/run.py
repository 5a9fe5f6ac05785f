"""Measure everything and write a flat `bench.json`.

    python benchmarks/run.py [--out bench.json] [--add] [--skip module] [module ...]

Every module beside this one that has a `measure()` returning a dict from name
to number is run; named ones alone if any are named.  Each number is a median
over repeats, and where a rival is measured it is so in the same process and
run, both taking turns.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

HERE = Path(__file__).parent


def modules() -> list[str]:
    """Return the modules here that measure something."""
    texts = {path.stem: path.read_text() for path in HERE.glob("*.py")}
    return sorted(name for name, text in texts.items() if "\ndef measure()" in text)


def machine() -> dict[str, str | int]:
    """Say what this ran on."""
    names = ("llmd-scheduler", "numpy", "ai-dynamo-runtime")
    versions: dict[str, str | int] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 0,
        **versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="bench.json", type=Path)
    parser.add_argument("--add", action="store_true", help="to what OUT holds")
    parser.add_argument("--skip", nargs="*", default=[], choices=modules())
    parser.add_argument("modules", nargs="*", choices=[[], *modules()])
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    known = options.add and options.out.exists()
    results: dict[str, float] = json.loads(options.out.read_text()) if known else {}
    failed = []
    for name in options.modules or modules():
        if name in options.skip:
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            results.update(importlib.import_module(name).measure())
        except Exception as error:  # one that cannot run here leaves the others be
            failed.append(name)
            print(f"{name} failed: {error!r}", file=sys.stderr)
    options.out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    about = options.out.with_suffix(".machine.json")
    about.write_text(json.dumps(machine(), indent=1) + "\n")
    for name, number in sorted(results.items()):
        print(f"{name:44} {number:14.4g}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
