"""What each event does to a cluster: one function an event.

Every function checks first, then changes, then returns commands, so that one
that raises has changed nothing.  A late event finds neither its worker nor its
booking and does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

from . import commands as c
from . import events as e
from .core import Core
from .errors import (
    EngineError,
    InvalidEvent,
    Rejected,
    WorkerLost,
    policy_error,
)

_MOST_TOKENS = 1 << 40


def arrived(core: Core, event: e.RequestArrived) -> list[c.Command]:
    request = event.request
    core.check(request)
    core.view.advance(event.at)
    balancer, opened = core.balancer, core.opened()
    try:
        verdict = balancer.admit(request, core.view)
        if not verdict.admitted:
            return [c.Fail(request, Rejected(verdict.reason, verdict.retry_after))]
        lane = core.waiting.push(request, core.view, since=event.at)
    except Exception as error:
        return [c.Fail(request, policy_error(balancer, error))]
    core.view.totals.requests += 1
    core.view.totals.prompt_tokens += request.prompt_tokens
    if request.deadline < math.inf:
        core.deadlines.add((request.deadline, request.id))
    core.waiting.tell(balancer.admitted, request, core.view)
    # Only its own lane has changed, unless time alone has opened another.
    return core.dispatch(None if opened else lane)


def cancelled(core: Core, event: e.RequestCancelled) -> list[c.Command]:
    core.view.advance(event.at)
    headed = core.waiting.heads(event.request_id)
    entry = core.waiting.remove(event.request_id, core.view)
    if entry is not None:
        core.gone(entry.request)
        # Who stood behind it may have room where it had none.
        return core.dispatch() if headed else []
    booking = core.books.get(event.request_id)
    if booking is None:
        return []
    aborts = core.abort(booking)
    core.gone(booking.request)
    return [*aborts, *core.dispatch()]


def prefill_ended(core: Core, event: e.PrefillEnded) -> list[c.Command]:
    core.view.advance(event.at)
    booking = core.books.held_by(event.request_id, event.worker)
    if booking is None or event.worker != booking.decision.first:
        return []
    core.index.settle(event.worker, booking.request, event.cached_tokens, event.at)
    core.books.prefill_done(booking)
    return core.dispatch()


def first_token(core: Core, event: e.FirstToken) -> list[c.Command]:
    core.view.advance(event.at)
    booking = core.books.held_by(event.request_id, event.worker)
    if booking is None or event.worker != booking.decision.decode:
        return []
    # Of KV that was handed over the engine says that it was cached.
    alone = booking.decision.first == event.worker
    cached = event.cached_tokens if alone else None
    for worker in booking.workers:
        core.index.settle(worker, booking.request, cached, event.at)
    booking.first_token_at = event.at
    core.books.first_token(booking)
    return [*core.charge(booking, 1), *core.dispatch()]


def generated(core: Core, event: e.TokensGenerated) -> list[c.Command]:
    tokens = event.tokens
    whole = type(tokens) is int or isinstance(tokens, Integral)
    if not whole or not 0 <= tokens <= _MOST_TOKENS:
        raise InvalidEvent(f"{event!r}: tokens must be a whole number, 0 or more")
    core.view.advance(event.at)
    booking = core.books.held_by(event.request_id, event.worker)
    if booking is None or not tokens:
        return []
    core.books.generated(booking, tokens)
    commands = core.charge(booking, tokens)
    return [*commands, *core.dispatch()] if commands or core.opened() else []


def ended(core: Core, event: e.RequestEnded) -> list[c.Command]:
    core.view.advance(event.at)
    booking = core.books.held_by(event.request_id, event.worker)
    if booking is None:
        return []
    core.judge(booking, event.worker, event.error)
    if event.error is None:
        core.view.totals.ended_requests += 1
        core.release(booking)
        core.gone(booking.request)
        return core.dispatch()
    others = [
        c.Abort(worker, event.request_id)
        for worker in booking.workers
        if worker != event.worker
    ]
    error = EngineError(f"{event.worker}: {event.error}")
    return [*others, core.retry(booking, event.worker, error), *core.dispatch()]


def joined(core: Core, event: e.WorkerJoined) -> list[c.Command]:
    worker = event.worker
    if worker.id in core.fleet:
        raise InvalidEvent(f"{event!r}: a worker of this id is there already")
    core.view.advance(event.at)
    core.fleet.join(worker)
    core.peers.joined(worker.id)
    core.models |= worker.models
    core.index.join(worker, event.at)
    return core.refresh()


def changed(core: Core, event: e.WorkerChanged) -> list[c.Command]:
    facts = event.facts
    if facts is not None and facts.id != event.worker:
        raise InvalidEvent(f"{event!r} tells of another worker")
    core.view.advance(event.at)
    if event.worker not in core.fleet:
        return []
    core.fleet.change(
        event.worker,
        event.state,
        facts,
        role=event.role,
        models=event.models,
        loras=event.loras,
    )
    if facts is not None:
        core.index.leave(event.worker, event.at)
        core.index.join(facts, event.at)
        core.models |= facts.models
    core.models |= event.models or frozenset()
    return core.refresh()


def left(core: Core, event: e.WorkerLeft) -> list[c.Command]:
    core.view.advance(event.at)
    row = core.fleet.row(event.worker)
    if row is None:
        return []
    commands: list[c.Command] = []
    worker, bookings = core.fleet.workers.facts[row], core.books.on(event.worker)
    core.fleet.leave(event.worker)
    core.view.workers = core.fleet.workers
    core.index.leave(event.worker, event.at)
    for booking in bookings:
        commands += [
            c.Abort(worker, booking.request.id)
            for worker in booking.workers
            if worker != event.worker
        ]
        core.judge(booking, event.worker, "the worker was lost")
        error = WorkerLost(f"worker {event.worker!r} was lost")
        commands.append(core.retry(booking, event.worker, error))
    core.books.close(event.worker)
    commands += core.refresh()
    return commands if event.replaced else [*commands, *core.bereave(worker)]


def model_added(core: Core, event: e.ModelAdded) -> list[c.Command]:
    core.view.advance(event.at)
    core.models.add(event.model)
    core.welcome.add(event.model)
    return []


def model_removed(core: Core, event: e.ModelRemoved) -> list[c.Command]:
    core.view.advance(event.at)
    core.models.discard(event.model)
    core.welcome.discard(event.model)
    commands: list[c.Command] = []
    for request in core.waiting.drop_model(event.model, core.view):
        error = core.unknown(f"model {event.model!r} was removed")
        core.gone(request)
        commands.append(c.Fail(request, error))
    return commands


def stored(core: Core, event: e.BlocksStored) -> list[c.Command]:
    core.view.advance(event.at)
    if event.worker in core.fleet:
        if event.window_tokens:
            core.index.window(event.worker, event.window_tokens, event.at)
        core.index.store(
            event.worker, event.hashes, event.block_tokens, event.tier, event.at
        )
    return []


def removed(core: Core, event: e.BlocksRemoved) -> list[c.Command]:
    core.view.advance(event.at)
    if event.worker in core.fleet:
        core.index.remove(event.worker, event.hashes, event.tier, event.at)
    return []


def cleared(core: Core, event: e.BlocksCleared) -> list[c.Command]:
    core.view.advance(event.at)
    if event.worker in core.fleet:
        drop = core.index.doubt if event.unknown else core.index.forget
        drop(event.worker, event.reason, event.at)
    return []


def reported(core: Core, event: e.SignalsReported) -> list[c.Command]:
    core.view.advance(event.at)
    row = core.fleet.row(event.worker)
    if row is not None:
        core.fleet.report(row, event)
    return []


def peer_reported(core: Core, event: e.PeerReported) -> list[c.Command]:
    core.view.advance(event.at)
    core.peers.expire(event.at)
    core.peers.hear(event)
    return core.dispatch()


def ticked(core: Core, event: e.Tick) -> list[c.Command]:
    scale = core.scale(event.at)
    core.view.advance(event.at)
    core.peers.expire(event.at)
    commands: list[c.Command] = []
    while core.deadlines and core.deadlines[0][0] <= event.at:
        commands += core.expire(core.deadlines[0][1])
    return [*commands, *core.dispatch(), *scale]


TRANSITIONS: dict[type, Callable[[Any, Any], list[c.Command]]] = {
    e.RequestArrived: arrived,
    e.RequestCancelled: cancelled,
    e.PrefillEnded: prefill_ended,
    e.FirstToken: first_token,
    e.TokensGenerated: generated,
    e.RequestEnded: ended,
    e.WorkerJoined: joined,
    e.WorkerChanged: changed,
    e.WorkerLeft: left,
    e.ModelAdded: model_added,
    e.ModelRemoved: model_removed,
    e.BlocksStored: stored,
    e.BlocksRemoved: removed,
    e.BlocksCleared: cleared,
    e.SignalsReported: reported,
    e.PeerReported: peer_reported,
    e.Tick: ticked,
}
