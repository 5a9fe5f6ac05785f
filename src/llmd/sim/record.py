"""Recording what a cluster saw and said, live or simulated, and replaying it.

A recording is JSON lines: a header with a version, then each event and each
command in order.  The same policies and seed give the same commands again, bit
for bit; other policies give other ones, and `counterfactual` tells what they
would have done for each request.
"""

from __future__ import annotations

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
from ..types import RequestId, Worker
from .codec import decode, encode, outline
from .sequence import EngineSettings
from .setting import Policies
from .study import Comparison, compare
from .workload import Job, Workload

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
    with Path(path).open() as file:
        header = _parsed(path, 1, file.readline())
        if header.get("llmd_recording") != VERSION:
            raise InvalidRequest(f"{path} is no recording of version {VERSION}")
        event: Event | None = None
        commands: list[Any] = []
        at = 1
        for number, line in enumerate(file, start=2):
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


@attrs.frozen(eq=False)
class Recording:
    """What a recording says of the world, whatever the policy was.

    Attributes:
        workload: What arrived and how long the answers were.
        workers: The fleet as it was when the first request arrived.
    """

    workload: Workload
    workers: tuple[Worker, ...]


def extract(path: str | Path) -> Recording:
    """Read the arrivals, answers and workers of a recording.

    Requests that never ended keep as long an answer as was seen, at least one
    token; clients that left are taken to leave as late again.
    """
    arrived: dict[RequestId, e.RequestArrived] = {}
    generated: dict[RequestId, int] = {}
    cancelled: dict[RequestId, float] = {}
    workers: dict[str, Worker] = {}
    for _, event, _ in read(path):
        match event:
            case e.WorkerJoined(worker=worker) if not arrived:
                workers[worker.id] = worker
            case e.WorkerChanged(worker=id, facts=Worker() as facts) if not arrived:
                workers[id] = facts
            case e.WorkerLeft(worker=id) if not arrived:
                workers.pop(id, None)
            case e.RequestArrived(request=request):
                arrived[request.id] = event
            case e.FirstToken(request_id=id):
                generated[id] = 1
            case e.TokensGenerated(request_id=id, tokens=tokens):
                generated[id] = generated.get(id, 1) + tokens
            case e.RequestCancelled(request_id=id) if id in arrived:
                cancelled[id] = event.at - arrived[id].at
    if not arrived or not workers:
        raise InvalidRequest(f"{path} has no requests, or nobody to serve them")
    jobs = [
        Job(
            request=event.request,
            output_tokens=max(generated.get(id, 1), 1),
            at=event.at,
            cancel_after_s=cancelled.get(id, float("inf")),
        )
        for id, event in arrived.items()
    ]
    size = min([worker.block_tokens for worker in workers.values()])
    workload = Workload(name=Path(path).stem, jobs=tuple(jobs), block_tokens=size)
    return Recording(workload, tuple(workers.values()))


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


def _parsed(path: str | Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise InvalidRequest(f"{path}, line {number}: {error}") from error
    if not isinstance(entry, dict):
        raise InvalidRequest(f"{path}, line {number}: {line.strip()[:80]!r}")
    return entry


def _decoded(path: str | Path, number: int, entry: dict[str, Any]) -> Event:
    try:
        event: Event = decode(entry["event"])
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InvalidRequest(f"{path}, line {number}: {what}") from error
    return event
