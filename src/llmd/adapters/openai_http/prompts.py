"""Texts and conversations become token ids, by the model's own engine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from ...errors import EngineError, UnknownModel
from ...live import Engine, Server

_TIMEOUT = 60.0


@attrs.define(eq=False)
class Tokenizers:
    """Finds an engine to tokenise for a model.

    The last engine of each model is remembered, since its tokenizer still
    works while the model is scaled to zero.
    """

    server: Server
    _last: dict[str, Engine] = attrs.field(factory=dict, init=False)

    async def text(self, model: str, text: str) -> list[int]:
        """Return the token ids of *text*."""
        async with asyncio.timeout(_TIMEOUT):
            return await self._engine(model).tokenize(text)

    async def chat(
        self, model: str, messages: Sequence[Mapping[str, Any]], body: Mapping[str, Any]
    ) -> list[int]:
        """Return the prompt of a conversation, by the model's own template."""
        async with asyncio.timeout(_TIMEOUT):
            return await self._engine(model).chat(
                messages,
                tools=body.get("tools"),
                template=body.get("chat_template_kwargs"),
            )

    def _engine(self, model: str) -> Engine:
        workers = self.server.cluster.view.workers
        for worker, ready in zip(workers.facts, workers.ready(), strict=True):
            if ready and (not model or not worker.models or model in worker.models):
                self._last[model] = self.server.engine(worker.id)
                return self._last[model]
        if model in self._last:
            return self._last[model]
        if model and model not in self.server.cluster.models:
            raise UnknownModel(f"no worker serves model {model!r}")
        raise EngineError(f"no worker of model {model!r} has started yet")
