"""Prompts made of named segments, so that no token need exist.

A system prompt, a document or a turn of a dialogue is a segment: a number that
stands for its text, and a length.  Two prompts share a prefix as far as their
leading segments agree, at any block size.  Names are a pure function of the
segments, equal in every process, so runs can be compared and replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from ..blocks import Prompt
from ..hashing import Hashes, Tokens

Segment: TypeAlias = tuple[int, int]  # (what it says, tokens)

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_GOLDEN = 0x9E37_79B9_7F4A_7C15
_SIZES_KEPT = 4


def mixed(values: Hashes) -> Hashes:
    """Scatter 64-bit numbers: the finaliser of SplitMix64 (Steele, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    mixed_values: Hashes = values ^ (values >> np.uint64(31))
    return mixed_values


def mix(value: int) -> int:
    """Scatter one number as `mixed` does."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
    return value ^ (value >> 31)


class SegmentPrompt(Prompt):
    """A prompt known by its segments.

    >>> system, question = (1, 600), (2, 40)
    >>> one = SegmentPrompt([system, question])
    >>> two = SegmentPrompt([system, (3, 90)])
    >>> shared = one.hashes(16)[:40] == two.hashes(16)[:40]
    >>> one.tokens, int(shared.sum())
    (640, 37)
    """

    __slots__ = ("segments",)

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments: tuple[Segment, ...] = tuple(segments)
        super().__init__(None, sum([tokens for _, tokens in self.segments]))

    def hashes(self, block_tokens: int) -> Hashes:
        """Name each full block's prefix, shape (tokens // block_tokens,)."""
        names = self._names.get(block_tokens)
        if names is None:
            names = self._named(block_tokens)
            while len(self._names) >= _SIZES_KEPT:
                self._names.pop(next(iter(self._names)))
            self._names[block_tokens] = names
        return names

    def followed(self, *segments: Segment) -> SegmentPrompt:
        """Return this prompt with *segments* behind it."""
        return SegmentPrompt((*self.segments, *segments))

    def tokenised(self, vocabulary: int = 32_000) -> Prompt:
        """Return real token ids below *vocabulary*, for engines that run.

        Prompts that share segments share tokens; others differ in almost all.
        """
        parts = [
            mixed(np.uint64(mix(what)) + np.arange(tokens, dtype=np.uint64) * _step())
            % np.uint64(vocabulary)
            for what, tokens in self.segments
        ]
        ids: Tokens = np.concatenate(parts)
        return Prompt.of(ids)

    def _named(self, block_tokens: int) -> Hashes:
        """Name prefixes: a sum over whole segments plus the part of the last."""
        names: list[Hashes] = []
        chain, start = 0, 0
        for place, (what, tokens) in enumerate(self.segments):
            root = mix(what * _GOLDEN + place)
            first = -(-(start + 1) // block_tokens) * block_tokens
            ends = np.arange(first, start + tokens + 1, block_tokens, dtype=np.uint64)
            offsets = (ends - np.uint64(start)) * _step()
            names.append(mixed(offsets + np.uint64(root)) + np.uint64(chain))
            chain = (chain + mix(tokens * _GOLDEN + root)) & _MASK
            start += tokens
        return np.concatenate(names)


def tokens_of(prompt: Prompt, vocabulary: int = 32_000) -> Tokens:
    """Return token ids for *prompt*: its own, or some that share as it does.

    A prompt known only by the names of its blocks gets tokens made from them,
    below *vocabulary*; so two such prompts share what their names share.

    >>> prompt = Prompt.named([7, 8], block_tokens=4, tokens=10)
    >>> other = Prompt.named([7, 9], block_tokens=4, tokens=9)
    >>> one, two = tokens_of(prompt), tokens_of(other)
    >>> len(one), bool((one[:4] == two[:4]).all()), bool((one[:8] == two[:8]).all())
    (10, True, False)
    """
    if prompt.ids is not None:
        return prompt.ids
    if isinstance(prompt, SegmentPrompt):
        ids = prompt.tokenised(vocabulary).ids
        assert ids is not None, "tokens were just made"
        return ids
    [(size, names), *_] = prompt._names.items()
    rest = prompt.tokens - len(names) * size
    offsets = np.arange(size, dtype=np.uint64) * _step()
    blocks = mixed(names[:, None] * _step() + offsets).ravel()
    last = int(names[-1]) if len(names) else 0
    tail = mixed(np.uint64(mix(last + 1)) + np.arange(rest, dtype=np.uint64) * _step())
    tokens: Tokens = np.concatenate([blocks, tail]) % np.uint64(vocabulary)
    return tokens


def _step() -> np.uint64:
    return np.uint64(_GOLDEN)
