"""The connector in vLLM's scheduler: who saves and who loads, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from ...transport.interface import TransferId
from .connector_plan import Load, Plan, Save, from_params, reserved, to_params


@attrs.define(eq=False)
class _Prompt:
    """A prompt that is computed for another engine.

    Attributes:
        id: Of the hand-off.
        tokens: To hand off: all but the last, which the other engine computes
            to have something to sample from.
        blocks: The engine's block ids so far.
        saved: Leading blocks that are planned to be gathered.
        complete: All are.
    """

    id: TransferId
    tokens: int
    blocks: list[int] = attrs.field(factory=list)
    saved: int = 0
    complete: bool = False


class SchedulerSide:
    """Follows requests from arrival to end; touches no KV itself."""

    def __init__(self, vllm_config: Any) -> None:
        self.addresses: Mapping[str, str] = {}
        self._block_tokens: int = vllm_config.cache_config.block_size
        self._prompts: dict[str, _Prompt] = {}
        self._tried: dict[str, TransferId] = {}
        self._plan = Plan()

    def loadable(self, request: Any, computed_tokens: int) -> int:
        """Return how many tokens beyond those computed another engine offers."""
        params = request.kv_transfer_params
        if from_params(params) is None or request.request_id in self._tried:
            # What could not be loaded once is computed.
            return 0
        return max(0, int(request.num_prompt_tokens) - 1 - computed_tokens)

    def allocated(self, request: Any, blocks: Any, external_tokens: int) -> None:
        """Plan what a request loads or saves, now that it has blocks."""
        params = request.kv_transfer_params or {}
        name = request.request_id
        if params.get("do_remote_decode") and name not in self._prompts:
            tokens = int(request.num_prompt_tokens) - 1
            id = reserved(params) or TransferId.fresh(name)
            self._prompts[name] = _Prompt(id, tokens)
        found = from_params(params)
        if found is None or name in self._tried:
            return
        id, address = found
        self._tried[name] = id
        ids, last = (
            blocks.get_block_ids()[0],
            self._blocks(request.num_prompt_tokens - 1),
        )
        # With nothing to load this still tells the other engine to let go.
        first = last
        if external_tokens:
            first = (
                request.num_prompt_tokens - 1 - external_tokens
            ) // self._block_tokens
        wanted = tuple(ids[first:last])
        self._plan.loads.append(Load(name, id, address, first, wanted))

    def plan(self, step: Any) -> Plan:
        """Return what the workers do in *step*."""
        plan, self._plan = self._plan, Plan()
        scheduled = step.num_scheduled_tokens
        plan.idle = not scheduled
        for new in step.scheduled_new_reqs:
            prompt = self._prompts.get(new.req_id)
            if prompt is not None:
                prompt.blocks = list(new.block_ids[0])
                done = new.num_computed_tokens + scheduled[new.req_id]
                self._save(prompt, done, plan)
        old = step.scheduled_cached_reqs
        for i, name in enumerate(old.req_ids):
            prompt = self._prompts.get(name)
            if prompt is None:
                continue
            if name in old.resumed_req_ids:
                prompt.blocks = []
            if old.new_block_ids[i] is not None:
                prompt.blocks += old.new_block_ids[i][0]
            self._save(prompt, old.num_computed_tokens[i] + scheduled[name], plan)
        return plan

    def finished(self, request: Any) -> dict[str, Any] | None:
        """Return what a decode engine needs, if the request was for one."""
        name = request.request_id
        tried = self._tried.pop(name, None)
        if tried is not None and request.num_output_tokens == 0:
            self._plan.drops.append(tried)
        prompt = self._prompts.pop(name, None)
        if prompt is None:
            return None
        aborted = str(request.status).endswith(("ABORTED", "ERROR", "IGNORED"))
        if aborted or not prompt.complete or not self.addresses:
            self._plan.drops.append(prompt.id)
            return None
        return to_params(prompt.id, self.addresses)

    def _save(self, prompt: _Prompt, computed_tokens: int, plan: Plan) -> None:
        total = self._blocks(prompt.tokens)
        if prompt.complete or not total:
            return
        last = computed_tokens >= prompt.tokens
        upto = total if last else computed_tokens // self._block_tokens
        if upto > prompt.saved:
            new = tuple(prompt.blocks[prompt.saved : upto])
            plan.saves.append(Save(prompt.id, prompt.saved, new, total, last))
            prompt.saved = upto
        prompt.complete = last

    def _blocks(self, tokens: int) -> int:
        """Return the blocks that hold *tokens*."""
        return -(-tokens // self._block_tokens)
