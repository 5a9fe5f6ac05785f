"""What a recording says of the world, whatever the policy was."""

from __future__ import annotations

import math
from collections import Counter

import attrs
import numpy as np

from .. import events as e
from ..events import Event
from ..types import Request, RequestId, State, Worker, WorkerId
from .codec import RecordedPrompt
from .workload import Job, Workload

_SOON_READY = (State.READY, State.STARTING, State.LOADING, State.WARMING)


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
        next: The prompt that has its own and its answer in front, as is known.
    """

    request: Request
    at: float
    ended: float = math.nan
    generated: int = 0
    left_s: float = math.inf
    before: _Seen | None = None
    next: RecordedPrompt | None = None

    def job(self, longest: int) -> Job:
        """Return it as a job; *longest* was the longest answer of all."""
        request, tokens = self.request, max(self.generated, 1)
        late = math.isnan(self.ended) and request.deadline < math.inf
        if late or self.left_s < math.inf:
            tokens = max(longest, tokens + 1)  # or else it had been answered
        tokens = min(tokens, request.max_new_tokens or tokens)
        follows, think_s = "", 0.0
        if self.before is not None:
            follows, think_s = self.before.request.id, self.at - self.before.ended
        answer = None
        if self.next is not None:
            answer = self.next.head(request.prompt_tokens + tokens)
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
    _stored: dict[int, set[int]] = attrs.field(factory=dict, init=False)
    """By block size, what engines said that they hold."""
    _uses: Counter[RequestId] = attrs.field(factory=Counter, init=False)
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
                ended = self._open.pop(id)
                ended.ended = event.at
                self._turns[ended.request.session] = ended
            case e.BlocksStored(hashes=names, block_tokens=size):
                self._stored.setdefault(size, set()).update(names.tolist())

    def recording(self, name: str) -> Recording | None:
        """Return what was recorded; None if nobody came, or nobody was there."""
        if not self._seen:
            return None
        longest = max([seen.generated for seen in self._seen.values()])
        jobs = [seen.job(longest) for seen in self._seen.values()]
        # Those that started were ready soon, or the first request waited for them.
        workers = tuple(
            attrs.evolve(worker, state=State.READY)
            for worker in self._workers.values()
            if worker.state in _SOON_READY
        )
        if not workers:
            return None
        size = min([worker.block_tokens for worker in workers])
        return Recording(Workload(name=name, jobs=jobs, block_tokens=size), workers)

    def _fleet(self, event: e.WorkerJoined | e.WorkerChanged | e.WorkerLeft) -> None:
        match event:
            case e.WorkerJoined(worker=worker):
                self._workers[worker.id] = worker
            case e.WorkerChanged(worker=id, facts=facts, state=state):
                worker = facts or self._workers.get(id) or Worker(id=id)
                self._workers[id] = attrs.evolve(worker, state=state or worker.state)
            case e.WorkerLeft(worker=id):
                self._workers.pop(id, None)

    def _arrived(self, request: Request, at: float) -> None:
        id = name = request.id
        while name in self._seen:  # an id may be used again, once it is free
            self._uses[id] += 1
            name = f"{id}~{self._uses[id] + 1}"
        if name != id:
            request = attrs.evolve(request, id=name)
        seen = self._seen[name] = self._open[id] = _Seen(request, at)
        before = self._turns.get(request.session) if request.session else None
        if before is not None and self._extends(request, before):
            seen.before = before
            if before.next is None and isinstance(request.prompt, RecordedPrompt):
                before.next = request.prompt

    def _extends(self, request: Request, before: _Seen) -> bool:
        """Say whether a prompt has another and its answer in front.

        It has where it begins with all full blocks of that prompt, of which there
        are some, and an engine had those that the answer filled.
        """
        told = before.request.prompt_tokens + before.generated
        size = min(_sizes(request) & _sizes(before.request), default=0)
        if not size or request.prompt_tokens < told:
            return False
        names, past = request.hashes(size), before.request.hashes(size)
        answer = names[len(past) : told // size].tolist()
        return (
            len(past) > 0
            and np.array_equal(names[: len(past)], past)
            and (not answer or answer[0] in self._stored.get(size, ()))
        )


def _sizes(request: Request) -> set[int]:
    prompt = request.prompt
    return set(prompt.sizes) if isinstance(prompt, RecordedPrompt) else set()
