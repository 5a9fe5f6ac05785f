"""Conversations: each turn continues the one before and hashes only what is new."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import attrs

from ..blocks import Prompt
from ..errors import InvalidRequest, Rejected, UnknownSession
from ..hashing import token_array
from ..types import Request
from .engine import Output
from .server import Server


@attrs.define(eq=False)
class _Session:
    fields: Mapping[str, Any]
    prompt: Prompt | None = None
    turns: int = 0
    busy: bool = False


@attrs.define(eq=False)
class Sessions:
    """Remembers what was said in each conversation over a server.

        sessions = Sessions(server)
        sessions.open("s1", model="m", tenant="t")
        async for output in sessions.ask("s1", tokens):
            ...

    Attributes:
        server: Answers.
        max_sessions: The least recently used one is closed beyond this many.
    """

    server: Server
    max_sessions: int = 10_000
    _sessions: OrderedDict[str, _Session] = attrs.field(factory=OrderedDict, init=False)

    def open(self, session: str, **fields: Any) -> None:
        """Begin a conversation.

        Args:
            session: Its name, not in use.
            fields: Of each turn's `Request`: model, lora, salt, tenant, priority.

        Raises:
            InvalidRequest: The name is empty or in use.
            Rejected: Too many are open, all of them waiting for an answer.
        """
        if not session or session in self._sessions:
            raise InvalidRequest(f"session {session!r} has no name or is open already")
        if len(self._sessions) >= self.max_sessions:
            idle = (name for name, one in self._sessions.items() if not one.busy)
            oldest = next(idle, None)
            if oldest is None:
                raise Rejected(f"{len(self._sessions)} sessions are in use", 1.0)
            del self._sessions[oldest]
        self._sessions[session] = _Session(fields)

    def close(self, session: str) -> None:
        """End a conversation.

        Raises:
            UnknownSession: It is not open.
        """
        self._find(session)
        del self._sessions[session]

    async def ask(
        self,
        session: str,
        tokens: Sequence[int],
        max_new_tokens: int | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[Output, None]:
        """Add a turn and yield the answer, which becomes part of the next prompt.

        A turn that fails or is abandoned leaves the conversation as it was.

        Raises:
            UnknownSession: It is not open.
            InvalidRequest: Its last turn is not answered yet.
        """
        one = self._find(session)
        if one.busy:
            raise InvalidRequest(f"session {session!r} is waiting for an answer")
        new = token_array(tokens)
        prompt = Prompt.of(new) if one.prompt is None else one.prompt.extended(new)
        one.turns += 1
        request = Request(
            id=f"{session}/{one.turns}",
            prompt=prompt,
            arrived_at=self.server.clock(),
            max_new_tokens=max_new_tokens,
            session=session,
            **one.fields,
        )
        said: list[int] = []
        one.busy = True
        try:
            answer = self.server.generate(request, sampling)
            async with contextlib.aclosing(answer) as outputs:
                async for output in outputs:
                    said += output.token_ids
                    yield output
            one.prompt = prompt.extended(said)
        finally:
            one.busy = False

    def _find(self, session: str) -> _Session:
        one = self._sessions.get(session)
        if one is None:
            raise UnknownSession(f"session {session!r} is not open")
        self._sessions.move_to_end(session)
        return one
