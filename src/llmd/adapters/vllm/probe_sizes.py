"""What a probe asks an engine for."""

from __future__ import annotations

from typing import Any

import attrs

from ...errors import EngineError

_LEAST_TOKENS = 256
_LEAST_VOCABULARY = 64
_LEAST_ANSWER = 12


@attrs.frozen(kw_only=True)
class Sizes:
    """Prompts and batches that show what an engine's steps take.

    Attributes:
        vocabulary: Ids of tokens are below it.
        step_tokens: Most tokens a step computes.
        longest: Most tokens a request may have, answer included.
        shared: The client shares cores with the engines, as those on CPUs do.
        rest_s: Before each prompt, for a GPU that computes it to cool.
        prompts: Lengths to probe, in one step each.
        joining: Lengths to probe beside requests that generate.
        contexts: Cached tokens ahead of them; none first.
        cached: Tokens of context of all requests of a probe, at most.
        batches: Requests that decode together, from one on.
        answer: Tokens of their answers.

    Raises:
        EngineError: They are too few for a probe.

    >>> sizes = Sizes.chosen(
    ...     vocabulary=1000, step_tokens=2048, longest=16_384, running=128,
    ...     kv_tokens=400_000, shared=False,
    ... )
    >>> sizes.prompts, sizes.contexts, sizes.batches
    ((64, 256, 512, 1024, 1536, 2016), (0, 2048, 8192), (1, 4, 16, 32, 64, 128))
    """

    vocabulary: int
    step_tokens: int
    longest: int
    shared: bool
    rest_s: float
    prompts: tuple[int, ...]
    joining: tuple[int, ...]
    contexts: tuple[int, ...]
    cached: int
    batches: tuple[int, ...]
    answer: int

    def __attrs_post_init__(self) -> None:
        few = {
            "vocabulary": self.vocabulary >= _LEAST_VOCABULARY,
            "prompts": bool(self.prompts) and min(self.prompts) > 0,
            "joining": bool(self.joining) and min(self.joining) > 0,
            "contexts": len(self.contexts) > 1 and self.contexts[0] == 0,
            "batches": bool(self.batches) and min(self.batches) == 1,
            "answer": self.answer >= _LEAST_ANSWER,
        }
        for name, enough in few.items():
            if not enough:
                raise EngineError(f"Sizes.{name} is {getattr(self, name)}: no probe")

    @property
    def fills(self) -> bool:
        """Whether one prompt can fill a step."""
        return self.step_tokens < self.longest

    @property
    def beside(self) -> tuple[int, ...]:
        """Batches that one more can join, each with the second of the contexts."""
        tokens, most = self.contexts[1], max(self.batches)
        return tuple(
            [n for n in self.batches if n < most and n * tokens <= self.cached]
        )

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """Choose them for a vLLM engine by its `vllm_config`.

        Raises:
            EngineError: It takes too short requests to tell anything.
        """
        cache, scheduler = config.cache_config, config.scheduler_config
        return cls.chosen(
            vocabulary=config.model_config.get_vocab_size(),
            step_tokens=scheduler.max_num_batched_tokens,
            longest=config.model_config.max_model_len,
            running=scheduler.max_num_seqs,
            kv_tokens=(cache.num_gpu_blocks - 1) * cache.block_size,
            shared=config.device_config.device_type == "cpu",
        )

    @classmethod
    def chosen(
        cls,
        *,
        vocabulary: int,
        step_tokens: int,
        longest: int,
        running: int,
        kv_tokens: int,
        shared: bool,
    ) -> Sizes:
        """Choose them for an engine of *running* requests and so many KV tokens."""
        if min(longest, kv_tokens) < _LEAST_TOKENS or step_tokens < _LEAST_TOKENS // 4:
            raise EngineError(
                f"steps of {step_tokens} tokens and requests of {longest} are too short"
                f" to probe with {kv_tokens} tokens of KV"
            )
        step = min(step_tokens, longest // 2, kv_tokens // 2)
        parts = (1 / 32, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 63 / 64)
        joining = (1 / 32, 1 / 4, 3 / 4) if shared else (1 / 2, 3 / 4, 63 / 64)
        # A head and behind it a prompt of a whole step have to fit.
        ahead = min(4 * step, longest // 2, kv_tokens // 2)
        batches = {max(running // part, 1) for part in (running, 32, 8, 4, 2, 1)}
        return cls(
            vocabulary=vocabulary,
            step_tokens=step_tokens,
            longest=longest,
            shared=shared,
            rest_s=0.0 if shared else 0.15,
            prompts=_of(step, parts),
            joining=_of(step, joining),
            contexts=(0, min(step, ahead // 2), ahead),
            cached=kv_tokens * 3 // 5,
            batches=tuple(sorted(batches)),
            answer=12 if shared else 30,
        )


def _of(step: int, parts: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(sorted({max(int(step * part), 8) for part in parts}))
