"""Prompts: tokens, and the names of their block-aligned prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from .errors import BlockSizeMismatch, EmptyPrompt, InvalidRequest
from .hashing import Hasher, Hashes, Tokens, process_hasher, token_array


class Prompt:
    """A prompt, known by its tokens or, in traces, by its block names alone.

    >>> prompt = Prompt.of(range(40))
    >>> prompt.tokens, len(prompt.hashes(block_tokens=16))
    (40, 2)
    >>> Prompt.named([7, 8], block_tokens=512, tokens=1100).hashes(512).tolist()
    [7, 8]
    """

    __slots__ = ("_hasher", "_names", "ids", "tokens")

    def __init__(
        self, ids: Tokens | None, tokens: int, hasher: Hasher | None = None
    ) -> None:
        if tokens < 1:
            raise EmptyPrompt("a prompt needs at least one token")
        self.ids: Tokens | None = ids
        self.tokens: int = tokens
        self._hasher = hasher
        self._names: dict[int, Hashes] = {}

    @classmethod
    def of(cls, tokens: Prompt | Sequence[int] | NDArray[Any] | bytes) -> Prompt:
        """Take a prompt in any form that `token_array` takes, or as it is."""
        if isinstance(tokens, Prompt):
            return tokens
        ids = token_array(tokens)
        return cls(ids, len(ids))

    @classmethod
    def named(
        cls, names: Sequence[int] | Hashes, block_tokens: int, tokens: int
    ) -> Prompt:
        """Make a prompt of *tokens* tokens whose full blocks have *names*.

        A name stands for the whole prefix that ends there, as in the
        `hash_ids` of Mooncake traces.  Surplus names are dropped.
        """
        prompt = cls(None, tokens)
        kept = np.asarray(names, dtype=np.uint64)[: tokens // block_tokens]
        prompt._names[block_tokens] = kept
        return prompt

    def hashes(self, block_tokens: int) -> Hashes:
        """Name each full block's prefix, shape (tokens // block_tokens,).

        Computed once for each block size and kept.

        Raises:
            BlockSizeMismatch: Only names at another block size are known.
        """
        names = self._names.get(block_tokens)
        if names is None:
            if self.ids is None:
                raise BlockSizeMismatch(
                    f"prompt is named by blocks of {[*self._names]} tokens,"
                    f" not of {block_tokens}"
                )
            names = (self._hasher or process_hasher()).hashes(self.ids, block_tokens)
            self._names[block_tokens] = names
        return names

    def extended(self, tokens: Sequence[int] | NDArray[Any]) -> Prompt:
        """Return this prompt with *tokens* behind it, hashing only those.

        Raises:
            InvalidRequest: This prompt's tokens are not known.
        """
        if self.ids is None:
            raise InvalidRequest("a prompt known by its names cannot be extended")
        ids = np.concatenate([self.ids, token_array(tokens)])
        longer = Prompt(ids, len(ids), self._hasher)
        hasher = self._hasher or process_hasher()
        for size, names in self._names.items():
            done = len(names) * size
            last = int(names[-1]) if done else 0
            more = hasher.hashes(ids[done:], size, done, last)
            longer._names[size] = np.concatenate([names, more])
        return longer

    def __repr__(self) -> str:
        return f"<Prompt of {self.tokens} tokens>"


@attrs.frozen
class Chain:
    """The end of a prefix: what its next block is hashed behind.

    Attributes:
        name: Of the prefix.
        tokens: Its length.
    """

    name: int
    tokens: int
