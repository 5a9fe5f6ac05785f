"""One try at answering a request on the engines it was dispatched to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from .. import events as e
from ..decision import Decision
from ..errors import EngineError, InvalidRequest, WorkerLost
from ..types import WorkerId
from .engine import Call, Engine, Output
from .ticket import Interrupted, Ticket

if TYPE_CHECKING:
    from .server import Server

_log = logging.getLogger("llmd.live")


async def attempt(
    server: Server, ticket: Ticket, sampling: Mapping[str, Any]
) -> AsyncGenerator[Output, None]:
    """Yield the answer from the workers of `ticket.decision`.

    Afterwards the ticket has ended, or waits for another decision.

    Raises:
        InvalidRequest: The engine will not take it; it is not tried again.
    """
    decision = ticket.decision
    assert decision is not None, "attempted before it was placed"
    worker = decision.decode
    try:
        request = ticket.rest()
        if request is None:
            yield Output(finish_reason="length")
            server.end(ticket)
            return
        call = Call(request=request, sampling=sampling)
        async with _prefilled(server, ticket, decision, call) as transfer:
            call = attrs.evolve(call, kv_transfer=transfer)
            async for output in _outputs(server.engine(worker), ticket, call):
                _report(server, ticket, worker, output)
                ticket.note(output)
                try:
                    yield output
                except BaseException:
                    # The client is gone: free its place before anything is awaited.
                    server.leave(ticket)
                    raise
        server.end(ticket)
    except Interrupted:
        return
    except InvalidRequest:
        server.end(ticket)
        raise
    except WorkerLost as error:
        server.lost(worker, str(error))
    except EngineError as error:
        server.end(ticket, str(error))


async def _outputs(
    engine: Engine, ticket: Ticket, call: Call
) -> AsyncGenerator[Output, None]:
    """Yield what *engine* yields, until the ticket leaves its worker.

    Raises:
        EngineError: The engine gave up on the request.
    """
    decision = ticket.decision
    async with contextlib.aclosing(_typed(engine.generate(call))) as outputs:
        while True:
            if ticket.ended or ticket.decision is not decision:
                raise Interrupted
            output = await ticket.during(anext(outputs, None))
            if output is None:
                return
            if output.finish_reason in ("abort", "error") and not ticket.ended:
                raise EngineError(f"the engine ended it with {output.finish_reason!r}")
            yield output


async def _typed(outputs: AsyncIterator[Output]) -> AsyncGenerator[Output, None]:
    """Yield *outputs*, an engine's unforeseen errors made EngineErrors."""
    try:
        async for output in outputs:
            yield output
    except (EngineError, InvalidRequest, WorkerLost):
        raise
    except Exception as error:
        raise EngineError(f"{type(error).__name__}: {error}") from error
    finally:
        close = getattr(outputs, "aclose", None)
        if close is not None:
            await close()


def _report(server: Server, ticket: Ticket, worker: WorkerId, output: Output) -> None:
    id = ticket.request.id
    # Text without tokens is at least one that the engine hides.
    tokens = len(output.token_ids) or int(output.text != "")
    if not ticket.streamed:
        if not tokens and output.finish_reason is None:
            return
        ticket.streamed = True
        first = e.FirstToken(server.clock(), worker, id, output.cached_tokens)
        server.handle(first)
        tokens -= 1
    if tokens > 0:
        server.handle(e.TokensGenerated(server.clock(), worker, id, tokens))


@contextlib.asynccontextmanager
async def _prefilled(
    server: Server, ticket: Ticket, decision: Decision, call: Call
) -> AsyncGenerator[Mapping[str, Any] | None, None]:
    """Give what hands the prompt's KV over, if another worker computes it.

    Where its engine can promise that, the prompt is still computed meanwhile; the
    decode engine hears from the other one if nothing comes of it.
    """
    worker = decision.first
    if worker == decision.decode:
        yield None
        return
    call = attrs.evolve(call, prefill_only=True)
    promise = server.engine(worker).promise(call.request)
    if promise is None:
        yield await _prefill(server, ticket, worker, call)
        return
    call = attrs.evolve(call, kv_transfer=promise.prefill)
    computing = asyncio.create_task(_prefill(server, ticket, worker, call))
    try:
        yield promise.decode
    finally:
        computing.cancel()
        await asyncio.gather(computing, return_exceptions=True)


async def _prefill(
    server: Server, ticket: Ticket, worker: WorkerId, call: Call
) -> Mapping[str, Any] | None:
    """Compute the prompt on *worker* and return what hands its KV over.

    Returns:
        None if it failed: the decode worker computes the prompt itself.
    """
    transfer = cached = None
    try:
        async with asyncio.timeout(server.prefill_timeout):
            async for output in _outputs(server.engine(worker), ticket, call):
                transfer = output.kv_transfer or transfer
                if output.cached_tokens is not None:
                    cached = output.cached_tokens
    except (TimeoutError, EngineError, WorkerLost) as error:
        _log.warning("prefill of %s on %s failed: %r", ticket.request.id, worker, error)
        cached = None
        server.counts["prefill_failures"] += 1
    event = e.PrefillEnded(server.clock(), worker, ticket.request.id, cached)
    server.handle(event)
    return transfer
