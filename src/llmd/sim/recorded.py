"""What a recording says of the world, whatever the policy was."""

from __future__ import annotations

import math

import attrs
import numpy as np

from .. import events as e
from ..events import Event
from ..types import Request, RequestId, State, Worker, WorkerId
from .codec import RecordedPrompt
from .workload import Job, Workload


@attrs.frozen(eq=False)
class Recording:
    """What a recording says of the world, whatever the policy was.

    Attributes:
        workload: What arrived and how long the answers were.
        workers: The fleet as it was when the first request arrived.
    """

    workload: Workload
    workers: tuple[Worker, ...]


@attrs.define(eq=False)
class _Seen:
    """A request, and what became of it.

    Attributes:
        at: When it arrived; *ended*, when its answer was whole.
        generated: Tokens of its answer.
        left_s: When its client left, from its arrival on.
        before: Whose answer it follows up on.
        next: Who followed up on its own.
    """

    request: Request
    at: float
    ended: float = math.nan
    generated: int = 0
    left_s: float = math.inf
    before: _Seen | None = None
    next: Request | None = None

    def job(self, longest: int) -> Job:
        """Return it as a job; *longest* was the longest answer of all."""
        request, tokens = self.request, max(self.generated, 1)
        if self.left_s < math.inf:
            tokens = max(longest, tokens + 1)  # or else the client had stayed
        tokens = min(tokens, request.max_new_tokens or tokens)
        follows, think_s = "", 0.0
        if self.before is not None:
            follows, think_s = self.before.request.id, self.at - self.before.ended
        answer = None
        if self.next is not None and isinstance(self.next.prompt, RecordedPrompt):
            answer = self.next.prompt.head(request.prompt_tokens + tokens)
        return Job(
            request=request,
            output_tokens=tokens,
            at=self.at,
            answer=answer,
            follows=follows,
            think_s=think_s,
            cancel_after_s=self.left_s,
        )


@attrs.define(eq=False)
class Reader:
    """Takes in the events of a recording, in order."""

    _seen: dict[RequestId, _Seen] = attrs.field(factory=dict, init=False)
    _open: dict[RequestId, _Seen] = attrs.field(factory=dict, init=False)
    _turns: dict[str, _Seen] = attrs.field(factory=dict, init=False)
    """By session, who was answered last."""
    _workers: dict[WorkerId, Worker] = attrs.field(factory=dict, init=False)

    def take(self, event: Event) -> None:
        """Take in one event."""
        match event:
            case e.WorkerJoined() | e.WorkerChanged() | e.WorkerLeft():
                if not self._seen:
                    self._fleet(event)
            case e.RequestArrived(request=request):
                self._arrived(request, event.at)
            case e.FirstToken(request_id=id) if id in self._open:
                self._open[id].generated += 1  # again where it went on elsewhere
            case e.TokensGenerated(request_id=id, tokens=tokens) if id in self._open:
                self._open[id].generated += tokens
            case e.RequestCancelled(request_id=id) if id in self._open:
                self._open[id].left_s = event.at - self._open[id].at
            case e.RequestEnded(request_id=id, error=None) if id in self._open:
                ended = self._open[id]
                ended.ended = event.at
                self._turns[ended.request.session] = ended

    def recording(self, name: str) -> Recording | None:
        """Return what was recorded; None if nobody came, or nobody was there."""
        if not self._seen or not self._workers:
            return None
        longest = max([seen.generated for seen in self._seen.values()])
        jobs = [seen.job(longest) for seen in self._seen.values()]
        # Those that started were ready soon, or the first request waited for them.
        workers = tuple(
            [attrs.evolve(w, state=State.READY) for w in self._workers.values()]
        )
        size = min([worker.block_tokens for worker in workers])
        return Recording(Workload(name=name, jobs=jobs, block_tokens=size), workers)

    def _fleet(self, event: e.WorkerJoined | e.WorkerChanged | e.WorkerLeft) -> None:
        match event:
            case e.WorkerJoined(worker=worker):
                self._workers[worker.id] = worker
            case e.WorkerChanged(worker=id, facts=Worker() as facts):
                self._workers[id] = facts
            case e.WorkerLeft(worker=id):
                self._workers.pop(id, None)

    def _arrived(self, request: Request, at: float) -> None:
        id, again = request.id, 1
        while request.id in self._seen:  # an id may be used again, once it is free
            again += 1
            request = attrs.evolve(request, id=f"{id}~{again}")
        seen = self._seen[request.id] = self._open[id] = _Seen(request, at)
        before = self._turns.get(request.session) if request.session else None
        if before is not None and before.next is None and _extends(request, before):
            seen.before, before.next = before, request


def _extends(request: Request, before: _Seen) -> bool:
    """Say whether a prompt has another and its answer in front, as far as is known."""
    earlier = before.request
    if request.prompt_tokens < earlier.prompt_tokens + before.generated:
        return False
    sizes = getattr(request.prompt, "sizes", ())
    return all(
        np.array_equal(request.hashes(size)[: len(past)], past)
        for size in sizes
        for past in (earlier.hashes(size),)
    )
