"""The matrix of the GH200 study, row by row, on real vLLM engines.

    python examples/gh200_study.py [--row N] [--json PATH]

Each row asks what the study asked and judges by what the engines themselves
count.  Exit status 0 if every row that is built passes.
"""

import argparse
import asyncio
import json
import logging
import sys
import time
import traceback

from study import ROWS, Row

from llmd.adapters.vllm.tiny import make_model


async def run(row: Row, model: str) -> dict:
    begun = time.monotonic()
    if row.test is None:
        passed, evidence = None, "not built yet"
    else:
        try:
            async with asyncio.timeout(300):
                passed, evidence = await row.test(model)
                passed = bool(passed)
        except Exception as error:
            traceback.print_exc()
            passed, evidence = False, f"{type(error).__name__}: {error}"
    return {
        "row": row.number,
        "feature": row.feature,
        "asked": row.asked,
        "evidence": evidence,
        "passed": passed,
        "seconds": round(time.monotonic() - begun, 1),
    }


def show(result: dict) -> None:
    word = {True: "pass", False: "FAIL", None: "-"}[result["passed"]]
    print(f"{result['row']:>3}  {word:5} {result['feature']}  ({result['seconds']} s)")
    print(f"           asked     {result['asked']}")
    print(f"           evidence  {result['evidence']}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--row", type=int, choices=[row.number for row in ROWS])
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--model", help="directory; a tiny one is made if not given")
    options = parser.parse_args()
    model = options.model or str(make_model(".models/tiny"))
    results = []
    for row in ROWS:
        if options.row in (None, row.number):
            results.append(asyncio.run(run(row, model)))
            show(results[-1])
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)
    failed = [result["row"] for result in results if result["passed"] is False]
    print(f"failed: {failed}" if failed else "every row that is built passes")
    return 1 if failed else 0


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    sys.exit(main())
