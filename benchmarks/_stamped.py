"""vLLM's schedulers, writing down when each step was scheduled and its outcome seen.

A line of JSON a step: when scheduling began, when it ended, when the step was
launched, when its outcome was seen; parts of prompts as [tokens, tokens ahead],
requests that generate, their tokens of context.  Seconds of the engine's monotonic
clock.  `STAMPS` names the file, to which the engine's process adds its own number.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

STAMPS = "LLMD_STAMPS"
_LINES = 400


class _Stamps:
    """Mixed into a scheduler."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._rows: dict[int, list[Any]] = {}
        self._lines: list[str] = []
        self._file = open(f"{os.environ[STAMPS]}.{os.getpid()}", "a")  # noqa: SIM115

    def schedule(self, *arguments: Any, **named: Any) -> Any:
        begun = time.monotonic()
        output = super().schedule(*arguments, **named)  # type: ignore[misc]
        if output.total_num_scheduled_tokens:
            row = [begun, time.monotonic(), 0.0, 0.0, *self._parts(output)]
            self._rows[id(output)] = row
        return output

    def get_grammar_bitmask(self, output: Any) -> Any:
        if row := self._rows.get(id(output)):
            row[2] = time.monotonic()
        return super().get_grammar_bitmask(output)  # type: ignore[misc]

    def update_from_output(self, output: Any, outcome: Any) -> Any:
        row = self._rows.pop(id(output), None)
        if row is not None:
            row[3] = time.monotonic()
            self._lines.append(json.dumps(row))
            if len(self._lines) >= _LINES:
                self._write()
        return super().update_from_output(output, outcome)  # type: ignore[misc]

    def reset_prefix_cache(self, *arguments: Any, **named: Any) -> Any:
        self._write()
        return super().reset_prefix_cache(*arguments, **named)  # type: ignore[misc]

    def _write(self) -> None:
        self._file.writelines(f"{line}\n" for line in self._lines)
        self._file.flush()
        self._lines.clear()

    def _parts(self, output: Any) -> tuple[list[list[int]], int, int]:
        """Return parts of prompts, requests that generate, and their context."""
        prompts, decoding, context = [], 0, 0
        for name, tokens in output.num_scheduled_tokens.items():
            request = self.requests[name]  # type: ignore[attr-defined]
            before = request.num_computed_tokens - tokens
            if before < request.num_prompt_tokens:
                prompts.append([tokens, before])
            else:
                decoding, context = decoding + 1, context + before
        return prompts, decoding, context


class InTurn(_Stamps, Scheduler):
    """Of an engine that schedules a step when the one before is over."""


class Ahead(_Stamps, AsyncScheduler):
    """Of one that schedules it before."""
