"""An engine that fails on command, for faults no real one shows when asked."""

import asyncio

import attrs
import pytest

import llmd
from llmd.errors import EngineError, InvalidRequest, WorkerLost
from llmd.live import Engine, Output


@attrs.define(eq=False)
class ScriptedEngine(Engine):
    """Answers with the prompt's first token again and again."""

    models: tuple[str, ...] = ()
    pace: float = 0.001
    fault: str = ""
    after: int = 0
    started: bool = False
    running: dict = attrs.field(factory=dict)
    calls: list = attrs.field(factory=list)
    death: asyncio.Future | None = None

    async def start(self, worker, report, progress):
        progress(llmd.State.LOADING)
        if self.fault == "start":
            raise EngineError("no such model")
        await asyncio.sleep(self.pace)
        progress(llmd.State.WARMING)
        self.started = True
        self.death = asyncio.get_running_loop().create_future()
        return llmd.Worker(id=worker, models=self.models, max_model_tokens=1000)

    async def generate(self, call):
        self.calls.append(call)
        id = call.request.id
        if self.fault == "invalid":
            raise InvalidRequest("temperature is -1")
        self.running[id] = asyncio.Event()
        try:
            wanted = 1 if call.prefill_only else call.request.max_new_tokens or 5
            for position in range(wanted):
                await asyncio.sleep(self.pace)
                if position == self.after:
                    await self._fail()
                if self.running[id].is_set():
                    yield Output(finish_reason="abort")
                    return
                last = position == wanted - 1
                yield Output(
                    token_ids=(int(call.request.prompt.ids[0]),),
                    finish_reason="length" if last else None,
                    cached_tokens=0,
                    kv_transfer={"from": "here"} if call.prefill_only else None,
                )
        finally:
            del self.running[id]

    async def _fail(self):
        if self.fault == "error":
            raise EngineError("out of luck")
        if self.fault == "bug":
            raise KeyError("oops")
        if self.fault == "hang":
            await asyncio.Event().wait()
        if self.fault == "die":
            self.die()
            raise WorkerLost("gone")

    def die(self):
        if not self.death.done():
            self.death.set_result("killed")

    async def abort(self, request_id):
        if request_id in self.running:
            self.running[request_id].set()

    async def stop(self):
        self.started = False

    async def died(self):
        return await self.death


@pytest.fixture
def make_engine():
    return ScriptedEngine
