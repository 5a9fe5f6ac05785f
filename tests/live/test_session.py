"""A conversation grows by its own answers."""

import pytest

from llmd import errors
from llmd.live import Server, Sessions


async def said(answer):
    return [token async for output in answer for token in output.token_ids]


async def test_each_turn_continues_the_last(make_engine):
    engine = make_engine()
    async with Server() as server:
        await server.add(engine)
        sessions = Sessions(server)
        sessions.open("s", tenant="t")
        assert await said(sessions.ask("s", [5, 6], max_new_tokens=2)) == [5, 5]
        assert await said(sessions.ask("s", [9], max_new_tokens=1)) == [5]
        second = engine.calls[-1].request
        assert second.prompt.ids.tolist() == [5, 6, 5, 5, 9]
        assert (second.session, second.tenant) == ("s", "t")


async def test_unknown_busy_and_doubled_sessions(make_engine):
    async with Server() as server:
        await server.add(make_engine())
        sessions = Sessions(server, max_sessions=1)
        with pytest.raises(errors.UnknownSession):
            await said(sessions.ask("s", [1]))
        sessions.open("s")
        with pytest.raises(errors.InvalidRequest, match="already"):
            sessions.open("s")
        answer = sessions.ask("s", [1], max_new_tokens=50)
        await anext(answer)
        with pytest.raises(errors.InvalidRequest, match="waiting"):
            await said(sessions.ask("s", [1]))
        with pytest.raises(errors.Rejected):
            sessions.open("other")
        await answer.aclose()
        sessions.open("other")
        with pytest.raises(errors.UnknownSession):
            sessions.close("s")


async def test_a_failed_turn_leaves_the_conversation_as_it_was(make_engine):
    engine = make_engine()
    async with Server() as server:
        await server.add(engine)
        sessions = Sessions(server)
        sessions.open("s")
        await said(sessions.ask("s", [1, 2], max_new_tokens=1))
        with pytest.raises(errors.PromptTooLong):
            await said(sessions.ask("s", [3], max_new_tokens=10_000))
        await said(sessions.ask("s", [4], max_new_tokens=1))
        assert engine.calls[-1].request.prompt.ids.tolist() == [1, 2, 1, 4]
