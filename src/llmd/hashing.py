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
import secrets
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidRequest
from .native import loops

Hashes: TypeAlias = NDArray[np.uint64]
Tokens: TypeAlias = NDArray[np.uint64]

_CHUNK_TOKENS = 1 << 16
_INT64 = np.dtype(np.int64)
_UINT64 = np.dtype(np.uint64)
_TOP = np.uint64(63)


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
        self.key: bytes = secrets.token_bytes(16) if key is None else key
        self._coefficients: Tokens = np.empty(0, dtype=np.uint64)
        # A view is opened faster than an array is.
        self._view = self._coefficients.data
        self._sums: Hashes = np.zeros(1, dtype=np.uint64)

    def __reduce__(self) -> tuple[type[Hasher], tuple[bytes]]:
        return type(self), (self.key,)

    def hashes(
        self,
        tokens: Tokens | Sequence[int],
        block_tokens: int,
        start_tokens: int = 0,
        start: int = 0,
    ) -> Hashes:
        """Name every block-aligned prefix of *tokens*, in O(tokens).

        Args:
            tokens: Shape (n,), the tokens from position *start_tokens* on.
            block_tokens: Tokens a block, at least 1.
            start_tokens: Length of what comes before.
            start: Its name.

        Returns:
            Shape (n // block_tokens,).

        Raises:
            TypeError: A sequence holds something else than whole numbers.
            OverflowError: It holds one below 0.
        """
        upto = start_tokens + len(tokens)
        if upto > len(self._coefficients):
            self._grow(upto)
        if not isinstance(tokens, (list, tuple)) and (
            getattr(tokens, "dtype", None) is not _UINT64
        ):
            tokens = token_array(tokens)
        if loops is None:
            return self._in_numpy(tokens, block_tokens, start_tokens, start)
        names: Hashes = np.empty(len(tokens) // block_tokens, _UINT64)
        loops.fold(tokens, self._view, start_tokens, start, block_tokens, names)
        return names

    def _in_numpy(
        self,
        tokens: Tokens | Sequence[int],
        block_tokens: int,
        start_tokens: int,
        start: int,
    ) -> Hashes:
        """Do what `hashes` does: one multiply-add a token, one running sum."""
        whole = len(tokens) // block_tokens * block_tokens
        weights = self._coefficients[start_tokens : start_tokens + whole]
        names: Hashes = np.vecdot(
            token_array(tokens)[:whole].reshape(-1, block_tokens),
            weights.reshape(-1, block_tokens),
        )
        np.add.accumulate(names, out=names)
        ends = slice(
            start_tokens + block_tokens, start_tokens + whole + 1, block_tokens
        )
        names += self._sums[ends]
        past = self._sums.item(start_tokens)
        names += np.uint64((start - past) & 0xFFFF_FFFF_FFFF_FFFF)
        return names

    def mark(
        self,
        names: Hashes,
        block_tokens: int,
        media: Iterable[tuple[int, str]],
        start_tokens: int = 0,
    ) -> Hashes:
        """Return *names* with what stands in the prompt beside tokens in them.

        Args:
            names: Of prefixes that end every *block_tokens* from
                *start_tokens* on, shape (n,); not changed.
            block_tokens: Tokens a block.
            media: Where each begins in the prompt, and its key; those that
                begin before *start_tokens* are in the names already.
            start_tokens: Length of what comes before.

        >>> hasher = Hasher(key=bytes(16))
        >>> names = hasher.hashes(np.arange(64), 16)
        >>> (hasher.mark(names, 16, [(40, "a picture")]) == names).tolist()
        [True, True, False, False]
        """
        marked = names.copy()
        for position, key in media:
            block = (position - start_tokens) // block_tokens
            if 0 <= block < len(marked):
                marked[block:] += self.seed("media", key, str(position))
        return marked

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

    def _grow(self, tokens: int) -> None:
        """Draw coefficients up to *tokens*, the same whatever came before."""
        have = len(self._coefficients) // _CHUNK_TOKENS
        need = -(-tokens // _CHUNK_TOKENS)
        if need <= have:
            return
        drawn = [self._draw(chunk) for chunk in range(have, need)]
        self._coefficients = np.concatenate([self._coefficients, *drawn])
        self._view = self._coefficients.data
        self._sums = np.zeros(len(self._coefficients) + 1, dtype=np.uint64)
        np.add.accumulate(self._coefficients, out=self._sums[1:])

    def _draw(self, chunk: int) -> Tokens:
        # Shake-256 is a pseudo-random function of the key, so that seeing
        # names does not give coefficients away as a statistical PRNG would.
        seed = hashlib.blake2b(chunk.to_bytes(8, "big"), key=self.key[:64]).digest()
        stream = hashlib.shake_256(seed).digest(8 * _CHUNK_TOKENS)
        return np.frombuffer(stream, dtype="<u8").astype(np.uint64) | np.uint64(1)


def token_array(tokens: Any) -> Tokens:
    """Return token ids as a uint64 array, without a copy where possible.

    Args:
        tokens: An integer array of one dimension, a sequence of ints from 0 up,
            or bytes, each byte a token (to route text untokenised).

    Raises:
        InvalidRequest: Not whole numbers, or below 0, or from 2**63 on.
    """
    ids = _ids(tokens)
    # Token -1 would add nothing to a name: the hash multiplies token + 1.
    far = loops.beyond(ids) if loops is not None else bool((ids >> _TOP).any())
    if far:
        raise InvalidRequest("token ids must be from 0 to 2**63 - 1")
    return ids


def _ids(tokens: Any) -> Tokens:
    if isinstance(tokens, np.ndarray):
        kind = tokens.dtype
        if tokens.ndim == 1 and (kind is _INT64 or kind is _UINT64):
            return tokens.view(_UINT64)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise InvalidRequest(
                f"token ids are {tokens.dtype}{tokens.shape}, want integers (n,)"
            )
        return tokens.astype(np.uint64, copy=False)
    if isinstance(tokens, memoryview) and tokens.itemsize > 1:
        return _ids(np.asarray(tokens))
    if isinstance(tokens, (bytes, bytearray, memoryview)):
        return np.frombuffer(tokens, dtype=np.uint8).astype(np.uint64)
    try:
        if loops is not None and isinstance(tokens, (list, tuple)):
            ids: Tokens = np.empty(len(tokens), _UINT64)
            loops.token_ids(tokens, ids)
            return ids
        return np.frombuffer(array.array("Q", tokens), dtype=np.uint64)
    except (TypeError, OverflowError, ValueError) as error:
        raise InvalidRequest(f"not token ids: {error}") from error


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
