"""Readers of public traces, and a writer.

No trace is packed with llmd: pass a path.  Files may be plain, `.gz`, or
`.zst` where the `zstd` program is installed.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from ..blocks import Prompt
from ..errors import InvalidRequest
from ..hashing import Hashes
from ..types import Request
from .catalogue import from_profile
from .prompts import SegmentPrompt, mixed
from .workload import Job, Workload

_ZSTD_S = 120.0
_LONGEST = 1 << 40
_ZONE = re.compile(r"(Z|[+-]\d\d:?\d\d)$")
_NOT_UNDERSTOOD = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
_NOT_READ = (EOFError, gzip.BadGzipFile, zlib.error)


def mooncake(path: str | Path, name: str = "") -> Workload:
    """Read Mooncake JSONL (FAST '25): 512-token blocks named by prefix.

    A line has `timestamp` in ms, `input_length`, `output_length` and
    `hash_ids`.  Only full blocks can be reused, so the last, partial one has
    no name here.  Arrival times of the published traces are rounded to 3 s:
    see `Workload.jittered`.
    """
    jobs = []
    for row, line in _filled(path):
        with _understood(path, row):
            fields = json.loads(line)
            tokens, ids = _tokens(fields["input_length"]), fields["hash_ids"]
            if len(set(ids)) < len(ids):
                raise ValueError("a block is named twice, and names tell of prefixes")
            prompt = Prompt.named(ids, block_tokens=512, tokens=tokens)
            jobs.append(
                Job(
                    request=Request(id=f"m{row}", prompt=prompt),
                    output_tokens=_tokens(fields["output_length"]),
                    at=float(fields["timestamp"]) / 1000.0,
                )
            )
    return Workload(name=name or _stem(path), jobs=jobs, block_tokens=512)


def write_mooncake(workload: Workload, path: str | Path) -> None:
    """Write *workload* as Mooncake JSONL, 512-token blocks.

    Followers are written at the time they would arrive if every answer took
    no time; the format knows no sessions, and no blocks of answers: who reads
    it finds less to reuse.  A name in `.gz` is compressed.

    Raises:
        BlockSizeMismatch: Its prompts have no names at 512 tokens; nothing is
            written then.
    """
    ids: dict[object, int] = {}
    ends: dict[str, float] = {}
    for job in workload.jobs:
        job.request.hashes(512)  # or there is nothing to write
    open_ = gzip.open if Path(path).suffix == ".gz" else open
    with open_(path, "wt", encoding="utf-8") as file:
        for job in _chronological(workload, ends):
            tokens = job.request.prompt_tokens
            names: list[object] = job.request.hashes(512).tolist()
            if tokens % 512:
                # A partial block has an id as well; nobody else's, to be safe.
                names.append(job.id)
            line = {
                "timestamp": round(ends[job.id] * 1000),
                "input_length": tokens,
                "output_length": job.output_tokens,
                "hash_ids": [ids.setdefault(name, len(ids)) for name in names],
            }
            file.write(json.dumps(line) + "\n")


def azure(path: str | Path, name: str = "", requests: int | None = None) -> Workload:
    """Read an Azure LLM inference trace (CSV; Splitwise, ISCA 2024).

    Columns TIMESTAMP, ContextTokens, GeneratedTokens.  Nothing is known of
    contents, so no prompt shares a prefix with another.
    """
    rows: list[tuple[datetime, int, int]] = []
    for row, line in enumerate(_rows(path)):
        if requests is not None and row >= requests:
            break
        with _understood(path, row + 1):
            when = _utc(line["TIMESTAMP"])
            tokens = _tokens(line["ContextTokens"])
            rows.append((when, tokens, _tokens(line["GeneratedTokens"])))
    start = min([when for when, *_ in rows], default=None)
    jobs = [
        Job(
            request=Request(id=f"a{row}", prompt=SegmentPrompt([(row, tokens)])),
            output_tokens=answer,
            at=(when - start).total_seconds() if start else 0.0,
        )
        for row, (when, tokens, answer) in enumerate(rows)
    ]
    return Workload(name=name or _stem(path), jobs=jobs)


def weka(
    path: str | Path, sessions: int | None = None, name: str = "", gap_s: float = 5.0
) -> Workload:
    """Read agent sessions of kv-cache-tester, one JSON object a line.

    Block ids are local to a session.  A request comes `think_time` seconds
    after the answer before it; sub-agents' requests run in their own line.

    Args:
        path: Of the file.
        sessions: Read only so many.
        name: Of the workload.
        gap_s: Seconds between the starts of two sessions, which the file does
            not tell.
    """
    jobs: list[Job] = []
    size = 0
    for row, line in _filled(path):
        if sessions is not None and row >= sessions:
            break
        with _understood(path, row):
            fields = json.loads(line)
            size = size or int(fields["block_size"])
            if fields["block_size"] != size or size < 1:
                raise ValueError(f"blocks of {fields['block_size']} tokens and {size}")
            root = f"k{row}"
            _session(jobs, root, row, fields["requests"], size, row * gap_s, ())
    return Workload(name=name or _stem(path), jobs=jobs, block_tokens=size or 64)


def _session(
    jobs: list[Job],
    root: str,
    row: int,
    requests: list[dict[str, Any]],
    size: int,
    start: float,
    path: tuple[int, ...],
    called: tuple[str, float] = ("", 0.0),
) -> None:
    """Append one line of requests, each following the one before.

    The first follows its caller, whose id and lead in seconds are *called*.
    """
    before, lead = called
    answered = 0.0
    for turn, fields in enumerate(requests):
        if "requests" in fields:
            # A sub-agent begins while its caller waits for it.
            inner, begin = (*path, turn), float(fields["t"])
            called = (before, max(begin - answered, 0.0))
            _session(jobs, root, row, fields["requests"], size, start, inner, called)
            continue
        answered = float(fields["t"]) + float(fields.get("api_time") or 0.0)
        tokens = _tokens(fields["in"])
        names = _chained(row, fields["hash_ids"])
        id = ".".join([root, *map(str, path), str(turn)])
        jobs.append(
            Job(
                request=Request(
                    id=id,
                    prompt=Prompt.named(names, block_tokens=size, tokens=tokens),
                    session=".".join([root, *map(str, path)]),
                    tenant=root,
                ),
                output_tokens=_tokens(fields["out"]),
                at=start + float(fields["t"]),
                follows=before,
                think_s=lead or max(float(fields.get("think_time") or 0.0), 0.0),
            )
        )
        before, lead = id, 0.0


def _tokens(count: Any) -> int:
    """Return a length as a trace tells it; none at all is a token here."""
    tokens = int(count)
    if not 0 <= tokens <= _LONGEST:
        raise ValueError(f"{count!r} is no number of tokens")
    return max(tokens, 1)


def _utc(text: str) -> datetime:
    """Read a time; Python reads six decimals, and Azure writes seven."""
    zone = _ZONE.search(text)
    when = datetime.fromisoformat(_ZONE.sub("", text)[:26])
    if zone is None or zone[0] == "Z":
        return when
    hours, minutes = zone[0][1:3], zone[0][-2:]
    east = timedelta(hours=int(hours), minutes=int(minutes))
    return when - east if zone[0][0] == "+" else when + east


def _chained(session: int, ids: list[int]) -> Hashes:
    """Name prefixes from local block ids: a sum over blocks scattered by place."""
    blocks = np.asarray(ids, dtype=np.uint64)
    places = np.arange(len(blocks), dtype=np.uint64)
    golden = np.uint64(0x9E37_79B9_7F4A_7C15)
    seeds = mixed(np.full(len(blocks), session + 1, dtype=np.uint64) * golden)
    names: Hashes = np.cumsum(mixed(mixed(blocks * golden + places) + seeds))
    return names


def inference_perf(
    path: str | Path, requests: int = 1000, rate: float = 1.0, seed: int = 0
) -> Workload:
    """Draw a workload from a profile of the inference-perf catalogue.

    Args:
        path: Of the profile's `config.json`.
        requests: How many.
        rate: Requests a second.
        seed: Of all that is drawn.
    """
    file = Path(path)
    with _understood(file, 0):
        profile = json.loads(file.read_text())
        return from_profile(profile, requests, rate, seed, file.parent.name)


def _filled(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers from 0 on."""
    for row, line in enumerate(_lines(path)):
        if line.strip():
            yield row, line


def _rows(path: str | Path) -> Iterator[dict[str, str]]:
    try:
        yield from csv.DictReader(_lines(path))
    except csv.Error as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from error


def _lines(path: str | Path) -> Iterator[str]:
    file = Path(path)
    try:
        if file.suffix == ".gz":
            with gzip.open(file, "rt", encoding="utf-8-sig") as lines:
                yield from lines
        elif file.suffix == ".zst":
            yield from io.StringIO(_unzstd(file))
        else:
            with file.open(encoding="utf-8-sig") as lines:
                yield from lines
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is no text: {error}") from error
    except _NOT_READ as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from error


def _unzstd(path: Path) -> str:
    program = shutil.which("zstd")
    if program is None:
        raise InvalidRequest(f"{path}: install zstd, or decompress it first")
    run = subprocess.run(
        [program, "-dcq", "--long=27", str(path)],
        capture_output=True,
        timeout=_ZSTD_S,
        check=False,
    )
    if run.returncode:
        raise InvalidRequest(f"{path}: {run.stderr.decode().strip()}")
    return run.stdout.decode()


@contextlib.contextmanager
def _understood(path: str | Path, row: int) -> Iterator[None]:
    """Say where in the file something is that makes no request."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}, line {row + 1}: {error}") from error
    except json.JSONDecodeError as error:
        what = f"no JSON at character {error.pos + 1}: {error.msg}"
        raise InvalidRequest(f"{path}, line {row + 1}: {what}") from error
    except _NOT_UNDERSTOOD as error:
        what = f"{type(error).__name__}: {error}"
        raise InvalidRequest(f"{path}, line {row + 1}: {what}") from error


def _stem(path: str | Path) -> str:
    return Path(path).name.split(".")[0]


def _chronological(workload: Workload, times: dict[str, float]) -> list[Job]:
    """Return its jobs in order of when they would come, and note that in *times*."""
    jobs = {job.id: job for job in workload.jobs}
    for job in workload.jobs:
        line = [job]
        while line[-1].follows in jobs and line[-1].id not in times:
            line.append(jobs[line[-1].follows])
        for one in reversed(line):
            before = times.get(one.follows)
            times[one.id] = one.at if before is None else before + one.think_s
    return sorted(workload.jobs, key=lambda job: times[job.id])
