"""Recording what a cluster saw and said, live or simulated, and replaying it.

A recording is JSON lines: a header with a version, then each event and each
command in order.  The same policies and seed give the same commands again, bit
for bit; other policies give other ones, and `counterfactual` tells what they
would have done for each request.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import attrs

from .. import events as e
from ..cluster import Cluster
from ..commands import Command
from ..errors import InvalidRequest
from ..events import Event
from ..machines import Machine
from ..types import Worker
from .codec import decode, encode, outline
from .recorded import Reader, Recording
from .sequence import EngineSettings
from .setting import Policies
from .study import Comparison, compare

VERSION = 1


@attrs.define(eq=False)
class Recorder:
    """Writes what a cluster sees and says; give it as `Cluster.observer`.

    Prompts are recorded by the names of their blocks and not by their tokens.
    A line is written for each event, so put a slow disk behind a buffer.

    Attributes:
        file: Where to write; the caller closes it.

    >>> import io
    >>> file = io.StringIO()
    >>> cluster = Cluster(observer=Recorder(file))
    >>> cluster.handle(e.WorkerJoined(0.0, Worker(id="a")))
    []
    >>> len(file.getvalue().splitlines())
    2
    """

    file: TextIO
    _sizes: dict[int, None] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._write({"llmd_recording": VERSION})

    def __call__(self, entry: Event | Command) -> None:
        if isinstance(entry, Command):
            self._write({"command": outline(entry)})
            return
        match entry:
            case e.WorkerJoined(worker=worker):
                self._sizes[worker.block_tokens] = None
            case e.WorkerChanged(facts=Worker() as worker):
                self._sizes[worker.block_tokens] = None
            case e.BlocksStored(block_tokens=block_tokens):
                self._sizes[block_tokens] = None
        self._write({"event": encode(entry, self._sizes)})

    def _write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line, separators=(",", ":")) + "\n")


@contextlib.contextmanager
def recording(cluster: Cluster, path: str | Path) -> Iterator[None]:
    """Record what *cluster* sees and says while this lasts.

    Workers that are there already are written down as if they joined then, so
    that `counterfactual` knows them; `replay` needs all from the very first event.

    >>> import tempfile
    >>> cluster = Cluster()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with recording(cluster, Path(folder, "run.jsonl")):
    ...         _ = cluster.handle(e.WorkerJoined(0.0, Worker(id="a")))
    ...     len(Path(folder, "run.jsonl").read_text().splitlines())
    2
    """
    before = cluster.observer
    with Path(path).open("w", encoding="utf-8") as file:
        recorder = Recorder(file)
        for worker in cluster.view.workers.facts:
            recorder(e.WorkerJoined(cluster.view.now, worker))

        def observe(entry: Event | Command) -> None:
            recorder(entry)
            if before is not None:
                before(entry)

        cluster.observer = observe
        try:
            yield
        finally:
            cluster.observer = before


@attrs.frozen
class Difference:
    """Where a replay first differs from its recording.

    Attributes:
        line: Of the file.
        event: After which commands differ.
        recorded: Commands then.
        replayed: Commands now.
    """

    line: int
    event: Event
    recorded: tuple[Any, ...]
    replayed: tuple[Any, ...]


def read(path: str | Path) -> Iterator[tuple[int, Event, list[Any]]]:
    """Yield (line, event, outlines of the commands that followed).

    Raises:
        InvalidRequest: The file is no recording, or of another version.
    """
    lines = _lines(path)
    number, line = next(lines, (1, "{}"))  # of which it is none
    if _parsed(path, number, line).get("llmd_recording") != VERSION:
        raise InvalidRequest(f"{path} is no recording of version {VERSION}")
    event: Event | None = None
    commands: list[Any] = []
    at = 1
    for number, line in lines:
        entry = _parsed(path, number, line)
        if "command" in entry:
            commands.append(entry["command"])
            continue
        if event is not None:
            yield at, event, commands
        event, commands, at = _decoded(path, number, entry), [], number
    if event is not None:
        yield at, event, commands


def replay(path: str | Path, cluster: Cluster) -> Difference | None:
    """Feed the events of a recording to *cluster*, a fresh one.

    Returns:
        None if it gave the very same commands, else the first difference.
    """
    for line, event, recorded in read(path):
        replayed = [outline(command) for command in cluster.handle(event)]
        if replayed != recorded:
            return Difference(line, event, tuple(recorded), tuple(replayed))
    return None


def extract(path: str | Path) -> Recording:
    """Read the arrivals, answers and workers of a recording.

    Requests that never ended keep as long an answer as was seen, at least one
    token; clients that left are taken to leave as late again, from an answer as
    long as the longest, and so are deadlines that passed.  A turn of a session
    whose prompt has the one before and its answer in front, as KV events tell,
    comes as long after that answer as it did, and finds the answer's KV where that
    was computed.  Of workers those count that were there when the first request
    came, see `recording`.

    Raises:
        InvalidRequest: It is no recording, or nobody came, or nobody was there.
    """
    reader = Reader()
    for _, event, _ in read(path):
        reader.take(event)
    found = reader.recording(Path(path).stem)
    if found is None:
        raise InvalidRequest(
            f"{path} has no requests, or nobody to serve them when the first one came"
        )
    return found


def counterfactual(
    path: str | Path,
    policies: Policies,
    *,
    machine: Machine | None = None,
    machines: Mapping[str, Machine] | None = None,
    settings: EngineSettings | None = None,
    jobs: int = 1,
) -> Comparison:
    """Tell what other policies would have done with the same requests.

    The first of *policies* is the one to compare with, as a rule the one that
    was recorded.  All run on the model of the same workers, so that what is
    compared is the policies and not the model with the world.
    `Comparison.deltas` has the difference for each request.

    Args:
        path: Of the recording.
        policies: By name, or in a list.
        machine: Step times of the workers; fit them to the fleet.
        machines: Where they differ, by the name in `Worker.machine`.
        settings: How the engines schedule.
        jobs: Processes to spread the runs over.
    """
    recording = extract(path)
    return compare(
        policies,
        recording.workload,
        workers=recording.workers,
        machine=machine,
        machines=machines,
        settings=settings,
        jobs=jobs,
    )


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers from 1 on."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is no text: {error}") from error


def _parsed(path: str | Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry: dict[str, Any] = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise InvalidRequest(f"{path}, line {number} is no JSON: {error}") from error
    if not isinstance(entry, dict):
        raise InvalidRequest(f"{path}, line {number}: {line.strip()[:80]!r}")
    return entry


def _decoded(path: str | Path, number: int, entry: dict[str, Any]) -> Event:
    try:
        event: Event = decode(entry["event"])
        if not isinstance(event, Event):
            raise TypeError(f"{entry['event']!r} is no event")
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InvalidRequest(f"{path}, line {number}: {what}") from error
    return event
