r"""An index as bytes: to restart warm, or to give another process what is known.

The layout is a line of magic, a header in JSON with its length before it, the
arrays one after the other, and a checksum of all that:

    b"llmd index\n"  version: u32  length: u32  header  arrays  blake2b: 16 bytes

Numbers are little-endian.  Names mean something only under the key that they
were made with; its fingerprint is in the header, the key is not.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidSnapshot
from ..hashing import Hasher, process_hasher
from ..types import Tier, Worker
from .blended import BlendedIndex
from .exact import ExactIndex
from .guessed import GuessedIndex
from .interface import PrefixIndex
from .tally import Record, Tally

_MAGIC = b"llmd index\n"
_VERSION = 2
_HEAD = struct.Struct("<II")
_SUM_BYTES = 16
_Arrays = list[NDArray[Any]]


def dump(index: PrefixIndex, hasher: Hasher | None = None) -> bytes:
    """Return all that *index* holds, for `restore`; O(blocks).

    Hopes are left out: they are of the moment.

    Raises:
        InvalidSnapshot: The index is of a kind that cannot be dumped.

    >>> data = dump(ExactIndex())
    >>> type(restore(data)).__name__
    'ExactIndex'
    """
    arrays: _Arrays = []
    header = _describe(index, arrays)
    header["key"] = (hasher or process_hasher()).fingerprint
    text = json.dumps(header).encode()
    parts = [_MAGIC, _HEAD.pack(_VERSION, len(text)), text]
    parts += [np.ascontiguousarray(array).tobytes() for array in arrays]
    body = b"".join(parts)
    return body + hashlib.blake2b(body, digest_size=_SUM_BYTES).digest()


def restore(data: bytes, hasher: Hasher | None = None) -> PrefixIndex:
    """Return the index that `dump` made *data* of.

    Workers keep their ids; one that is gone is to be told of with `leave`.

    Raises:
        InvalidSnapshot: It is damaged, of another version or another key.
    """
    body, checksum = data[:-_SUM_BYTES], data[-_SUM_BYTES:]
    if not body.startswith(_MAGIC):
        raise InvalidSnapshot("this is no dumped index")
    if hashlib.blake2b(body, digest_size=_SUM_BYTES).digest() != checksum:
        raise InvalidSnapshot("the checksum does not fit: the dump is damaged")
    version, length = _HEAD.unpack_from(body, len(_MAGIC))
    if version != _VERSION:
        raise InvalidSnapshot(f"dump of version {version}, this reads {_VERSION}")
    start = len(_MAGIC) + _HEAD.size
    header = json.loads(body[start : start + length])
    known = (hasher or process_hasher()).fingerprint
    if header["key"] != known:
        raise InvalidSnapshot(
            f"its names are under key {header['key']}, this process has {known}:"
            " see llmd.hashing.share_key"
        )
    return _rebuild(header, _Reader(body, start + length))


class _Reader:
    """Takes arrays off the body, one after the other."""

    def __init__(self, body: bytes, at: int) -> None:
        self.body = body
        self.at = at

    def take(self, count: int, kind: str = "<u8") -> NDArray[Any]:
        array = np.frombuffer(self.body, kind, count, self.at)
        self.at += array.nbytes
        return array


def _describe(index: PrefixIndex, arrays: _Arrays) -> dict[str, Any]:
    if isinstance(index, BlendedIndex):
        return {
            "kind": "blended",
            "exact": _describe(index.exact, arrays),
            "guessed": _describe(index.guessed, arrays),
            "records": {id: _record(known) for id, known in index.records.items()},
        }
    if isinstance(index, ExactIndex):
        return _describe_exact(index, arrays)
    if isinstance(index, GuessedIndex):
        return _describe_guessed(index, arrays)
    raise InvalidSnapshot(f"{type(index).__name__} cannot be dumped")


def _record(record: Record) -> dict[str, Any]:
    return {
        "exact": attrs.astuple(record.exact),
        "guessed": attrs.astuple(record.guessed),
        "silent": record.silent,
        "doubted": record.doubted,
        "owes": record.owes,
    }


def _describe_exact(index: ExactIndex, arrays: _Arrays) -> dict[str, Any]:
    """List the names that each worker holds in each tier."""
    workers = []
    held: list[list[list[int]]] = []
    for worker, block_tokens, bit in index.seated():
        workers.append(
            {
                "id": worker,
                "block_tokens": block_tokens,
                "window": index.window_tokens(bit),
            }
        )
        held.append([index.held(bit, tier) for tier in Tier])
    for tiers in held:
        arrays += [np.array(names, dtype="<u8") for names in tiers]
    counts = [[len(names) for names in tiers] for tiers in held]
    settings = {"grace": index.grace, "max_blocks": index.max_blocks}
    return {"kind": "exact", "workers": workers, "counts": counts, **settings}


def _describe_guessed(index: GuessedIndex, arrays: _Arrays) -> dict[str, Any]:
    """List the prompts that each worker was sent, oldest first."""
    workers = []
    for worker, log in index.logs():
        workers.append(
            {
                "id": worker.id,
                "block_tokens": worker.block_tokens,
                "kv_blocks": worker.kv_blocks,
                "sent": [[at, len(names)] for at, names in log],
            }
        )
        arrays += [np.array(names, dtype="<u8") for _, names in log]
    settings = {"grain_tokens": index.grain_tokens, "ttl": index.ttl}
    return {"kind": "guessed", "workers": workers, **settings}


def _rebuild(header: dict[str, Any], reader: _Reader) -> PrefixIndex:
    if header["kind"] == "blended":
        exact = _rebuild_exact(header["exact"], reader)
        blend = BlendedIndex(exact, _rebuild_guessed(header["guessed"], reader))
        for id, known in header["records"].items():
            blend.recall(id, _recalled(known))
        return blend
    if header["kind"] == "exact":
        return _rebuild_exact(header, reader)
    return _rebuild_guessed(header, reader)


def _recalled(known: dict[str, Any]) -> Record:
    # Clocks of two processes differ: an event is known to be long past.
    past = -sys.float_info.max
    return Record(
        exact=Tally(*known["exact"]),
        guessed=Tally(*known["guessed"]),
        last_event=-float("inf") if known["silent"] else past,
        doubted=known["doubted"],
        owed_since=past if known["owes"] else float("inf"),
    )


def _rebuild_exact(header: dict[str, Any], reader: _Reader) -> ExactIndex:
    index = ExactIndex(grace=header["grace"], max_blocks=header["max_blocks"])
    never = -float("inf")
    for worker, counts in zip(header["workers"], header["counts"], strict=True):
        size = worker["block_tokens"]
        for tier, count in zip(Tier, counts, strict=True):
            names = reader.take(count).astype(np.uint64)
            index.store(worker["id"], names, size, tier, never)
        if worker["window"]:
            index.window(worker["id"], worker["window"], never)
    return index


def _rebuild_guessed(header: dict[str, Any], reader: _Reader) -> GuessedIndex:
    index = GuessedIndex(grain_tokens=header["grain_tokens"], ttl=header["ttl"])
    for known in header["workers"]:
        sizes = {name: known[name] for name in ("block_tokens", "kv_blocks")}
        index.join(Worker(id=known["id"], **sizes), at=0.0)
        for at, count in known["sent"]:
            index.sent(known["id"], reader.take(count).tolist(), at)
    return index
