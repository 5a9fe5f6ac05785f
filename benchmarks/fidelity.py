"""The simulator beside real vLLM engines, on the same requests.

    python benchmarks/fidelity.py [--engines 2] [--seconds 20] [--json PATH]
    python benchmarks/fidelity.py --gpu [--json PATH]
    python benchmarks/fidelity.py [--gpu] --again PATH [--probe PATH]
    python benchmarks/fidelity.py --watch 120

Engines with random weights are probed for 30 to 40 s: prompts, cached prompts and
batches of all sizes.  `fit_from_probe` makes step times of that, and what is left
of the times to first token is the settings' intake.  A workload at 30, 60 and 85 %
of what the modelled fleet keeps up with is then sent to the engines by
`LoadGenerator`, and simulated with the same router on the same requests.  Nothing
is fitted to these.  So with each of four workloads.  `--again` simulates anew what
`--json` kept, with its own probe or that of another run, and needs no engine.
`--stamps` has vLLM's scheduler write down each step, and says what they took.

On CPUs a model of many narrow layers, one core an engine; with `--gpu` one engine of
the shape of Qwen2.5-7B.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path
from typing import Any

from _modelled import again, summed, told
from _sites import CPU, GPU

NAMES = ("dialogue", "documents", "batch", "shared_prefix")
LOADS = (0.3, 0.6, 0.85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--engines", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--watch", type=float, metavar="SECONDS")
    parser.add_argument("--cells", nargs="*", metavar="WORKLOAD:LOAD")
    parser.add_argument("--again", type=Path, metavar="JSON")
    parser.add_argument("--probe", type=Path, metavar="JSON")
    parser.add_argument("--stamps", type=Path, help="files of what each step took")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Answers of so many requests are handled without a look at whose turn it is.
    os.environ.setdefault("VLLM_V1_OUTPUT_PROC_CHUNK_SIZE", "4")
    if options.stamps:
        os.environ["LLMD_STAMPS"] = str(options.stamps.absolute())
    site, engines = (GPU, 1) if options.gpu else (CPU, 2)
    cells = [(name, load) for name in NAMES for load in LOADS]
    if options.cells:
        split = [cell.split(":") for cell in options.cells]
        cells = [(name, float(load)) for name, load in split]

    if options.again:
        measured = json.loads(options.again.read_text())
        other = json.loads(options.probe.read_text()) if options.probe else measured
        if not all("engines" in found for found in other):
            parser.error(f"{options.again} has no probe: name one with --probe")
        rows = again(site, measured, other)
        print(*map(told, rows), summed(rows), sep="\n")
        return
    # With what needs engines, which a look at what was kept does not.
    from _measured import measure, watch

    def keep(found: list[dict[str, Any]]) -> None:
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")

    if options.watch:
        asyncio.run(watch(site, options.engines or engines, options.watch))
        return
    count = options.engines or engines
    asyncio.run(measure(site, count, options.seconds, cells, keep))


if __name__ == "__main__":
    main()
