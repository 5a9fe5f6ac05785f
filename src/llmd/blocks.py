"""Prefix hashing: tokens in, one name for each block-aligned prefix out.

Theory.  A prefix of n tokens t_0 .. t_{n-1} is named

    H(n) = sum of C[k] * (t_k + 1) for k < n,  modulo 2**64

with secret random odd coefficients C, one for each position.  This is the
multilinear family (Lemire and Kaser, "Strongly universal string hashing is
fast", The Computer Journal 57(11), 2014) applied to all prefixes at once: one
multiply-add a token, then a running sum over blocks.  Three things follow.

* A name depends on the tokens alone, not on the block size: an engine with
  64-token blocks and one with 32-token blocks agree wherever both have a
  boundary.
* A prefix is extended from its name and length; nothing is hashed twice.
* Two different prefixes get equal names with a chance of at most
  2**-(63 - z), over the choice of C, where 2**z divides all differences of
  their tokens: 2**-46 for the worst pair of a 128k vocabulary, 2**-63 for
  most.  Whoever does not know C cannot search for a collision.  A polynomial
  hash would be as fast, but falls to Thue-Morse strings under every base.
"""

from __future__ import annotations

import array
import functools
import hashlib
import operator
import secrets
from collections.abc import Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from .errors import BlockSizeMismatch, EmptyPrompt, InvalidRequest

Hashes: TypeAlias = NDArray[np.uint64]
Tokens: TypeAlias = NDArray[np.uint64]

_CHUNK_TOKENS = 1 << 16
_SIZES_KEPT = 8
_PARTS_KEPT = 1 << 12
_INT64 = np.dtype(np.int64)
_UINT64 = np.dtype(np.uint64)
_PLAIN_TOKENS = 1 << 12


class Hasher:
    """Names prefixes with coefficients drawn from *key*.

    Two processes that share a key share names.  Not thread-safe while it
    grows to a longer prompt than any before.

    Args:
        key: 16 bytes or more of secret, drawn at random if not given.

    >>> one = Hasher(key=bytes(16))
    >>> tokens = np.arange(64, dtype=np.uint64)
    >>> bool((one.hashes(tokens, 32) == one.hashes(tokens, 16)[1::2]).all())
    True
    """

    def __init__(self, key: bytes | None = None) -> None:
        self.key = secrets.token_bytes(16) if key is None else key
        self._coefficients: Tokens = np.empty(0, dtype=np.uint64)
        self._sums: Hashes = np.zeros(1, dtype=np.uint64)
        self._plain: list[int] = []
        self._tables: dict[int, tuple[Tokens, Hashes]] = {}
        self._parts: dict[tuple[int, int], tuple[Tokens, Hashes]] = {}

    def hashes(
        self,
        tokens: Tokens,
        block_tokens: int,
        start_tokens: int = 0,
        start: int = 0,
    ) -> Hashes:
        """Name every block-aligned prefix of *tokens*, in O(tokens).

        Args:
            tokens: Shape (n,), the tokens from position *start_tokens* on.
            block_tokens: Tokens a block, at least 1.
            start_tokens: Length of what comes before, a whole number of blocks.
            start: Its name.

        Returns:
            Shape (n // block_tokens,).
        """
        if start_tokens:
            return self._behind(tokens, block_tokens, start_tokens, start)
        blocks = len(tokens) // block_tokens
        part = self._parts.get((block_tokens, blocks))
        weights, offsets = part or self._part(block_tokens, blocks)
        if len(tokens) != blocks * block_tokens:
            tokens = tokens[: blocks * block_tokens]
        # Three numpy calls: a prompt of 1k tokens is mostly their overhead.
        hashes: Hashes = np.add.accumulate(
            np.vecdot(tokens.reshape(blocks, block_tokens), weights)
        )
        return np.add(hashes, offsets, hashes)

    def _behind(
        self, tokens: Tokens, block_tokens: int, start_tokens: int, start: int
    ) -> Hashes:
        blocks = len(tokens) // block_tokens
        first = start_tokens // block_tokens
        weights, offsets = self._table(block_tokens, first + blocks)
        hashes: Hashes = np.vecdot(
            tokens[: blocks * block_tokens].reshape(blocks, block_tokens),
            weights[first : first + blocks],
        )
        np.add.accumulate(hashes, out=hashes)
        hashes += offsets[first : first + blocks]
        past = self._sums.item(start_tokens)
        hashes += np.uint64((start - past) & 0xFFFF_FFFF_FFFF_FFFF)
        return hashes

    def extend(
        self, tokens: Sequence[int], start_tokens: int = 0, start: int = 0
    ) -> int:
        """Name the prefix that *tokens* make longer: the last of `hashes`.

        For the single block that a decoding engine reports, plain integers are
        five times as fast as arrays are.

        >>> one = Hasher(key=bytes(16))
        >>> first = one.extend(range(16))
        >>> tokens = np.arange(32, dtype=np.uint64)
        >>> bool(one.extend(range(16, 32), 16, first) == one.hashes(tokens, 16)[-1])
        True
        """
        end = start_tokens + len(tokens)
        if end > len(self._plain):
            self._grow(end)
            upto = min(len(self._coefficients), end + _PLAIN_TOKENS)
            self._plain += self._coefficients[len(self._plain) : upto].tolist()
        total: int = sum(map(operator.mul, tokens, self._plain[start_tokens:end]))
        total += int(self._sums[end]) - int(self._sums[start_tokens])
        return (start + total) & 0xFFFF_FFFF_FFFF_FFFF

    @property
    def fingerprint(self) -> str:
        """A name of the key that does not give it away."""
        return hashlib.blake2b(b"llmd", digest_size=8, key=self.key[:64]).hexdigest()

    def seed(self, *names: str) -> np.uint64:
        """Return a number to add to names that must not meet others.

        No names, or only empty ones, give 0.
        """
        if not any(names):
            return np.uint64(0)
        parts = b"".join(
            len(name.encode()).to_bytes(4, "big") + name.encode() for name in names
        )
        digest = hashlib.blake2b(parts, digest_size=8, key=self.key[:64]).digest()
        return np.uint64(int.from_bytes(digest, "big"))

    def _part(self, block_tokens: int, blocks: int) -> tuple[Tokens, Hashes]:
        """Return and keep the head of `_table` for prompts of *blocks* blocks."""
        weights, offsets = self._table(block_tokens, blocks)
        if len(self._parts) >= _PARTS_KEPT:
            self._parts.clear()
        part = self._parts[block_tokens, blocks] = weights[:blocks], offsets[:blocks]
        return part

    def _table(self, block_tokens: int, blocks: int) -> tuple[Tokens, Hashes]:
        """Return coefficients by block and their running sums at boundaries."""
        table = self._tables.get(block_tokens)
        if table is None or len(table[1]) < blocks:
            self._grow(blocks * block_tokens)
            whole = len(self._coefficients) // block_tokens
            rows = self._coefficients[: whole * block_tokens]
            table = (
                rows.reshape(whole, block_tokens),
                np.ascontiguousarray(self._sums[block_tokens::block_tokens]),
            )
            while len(self._tables) >= _SIZES_KEPT:
                self._tables.pop(next(iter(self._tables)))
            self._tables[block_tokens] = table
        return table

    def _grow(self, tokens: int) -> None:
        """Draw coefficients up to *tokens*, the same whatever came before."""
        have = len(self._coefficients) // _CHUNK_TOKENS
        need = -(-tokens // _CHUNK_TOKENS)
        if need <= have:
            return
        drawn = [self._draw(chunk) for chunk in range(have, need)]
        self._coefficients = np.concatenate([self._coefficients, *drawn])
        self._sums = np.zeros(len(self._coefficients) + 1, dtype=np.uint64)
        np.add.accumulate(self._coefficients, out=self._sums[1:])
        self._tables.clear()
        self._parts.clear()

    def _draw(self, chunk: int) -> Tokens:
        # Shake-256 is a pseudo-random function of the key, so that seeing
        # names does not give coefficients away as a statistical PRNG would.
        seed = hashlib.blake2b(chunk.to_bytes(8, "big"), key=self.key[:64]).digest()
        stream = hashlib.shake_256(seed).digest(8 * _CHUNK_TOKENS)
        return np.frombuffer(stream, dtype="<u8").astype(np.uint64) | np.uint64(1)


_PROCESS: list[Hasher] = []


def process_hasher() -> Hasher:
    """Return the hasher of this process, its key drawn on the first call."""
    if not _PROCESS:
        _PROCESS.append(Hasher())
    return _PROCESS[0]


def share_key(key: bytes) -> Hasher:
    """Name all prompts of this process under *key*, as other processes do.

    To be called before the first prompt is named.  The key is a secret: who has
    it can forge prompts that share a name.

    Raises:
        InvalidRequest: Prompts were named under another key already, or the key
            is shorter than 16 bytes.
    """
    if len(key) < 16:
        raise InvalidRequest(f"the key has {len(key)} bytes, want 16 or more")
    if _PROCESS and _PROCESS[0].key != key:
        raise InvalidRequest("this process names prompts under another key already")
    if not _PROCESS:
        _PROCESS.append(Hasher(key))
    return _PROCESS[0]


@functools.lru_cache(maxsize=4096)
def seed_of(salt: str, lora: str, hasher: Hasher | None = None) -> np.uint64:
    """Return what *salt* and *lora* add to every name of a request."""
    return (hasher or process_hasher()).seed(salt, lora)


def token_array(tokens: Any) -> Tokens:
    """Return token ids as a uint64 array, without a copy where possible.

    Args:
        tokens: An integer array of one dimension, a sequence of ints from 0 up,
            or bytes, each byte a token (to route text untokenised).

    Raises:
        InvalidRequest: Not whole numbers, or below 0 in a sequence.
    """
    if isinstance(tokens, np.ndarray):
        kind = tokens.dtype
        if tokens.ndim == 1 and (kind is _INT64 or kind is _UINT64):
            return tokens.view(_UINT64)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise InvalidRequest(
                f"token ids are {tokens.dtype}{tokens.shape}, want integers (n,)"
            )
        return tokens.astype(np.uint64, copy=False)
    if isinstance(tokens, (bytes, bytearray, memoryview)):
        return np.frombuffer(tokens, dtype=np.uint8).astype(np.uint64)
    try:
        return np.frombuffer(array.array("Q", tokens), dtype=np.uint64)
    except (TypeError, OverflowError, ValueError) as error:
        raise InvalidRequest(f"not token ids: {error}") from error


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
        self.ids = ids
        self.tokens = tokens
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
