"""The values that events, commands and policies exchange.

All are frozen.  Times are seconds as `float`; every other number carries its
unit in its name.  A missing measurement is NaN or None, never a magic number.
"""

from __future__ import annotations

import enum
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import attrs

from .blocks import Prompt
from .errors import InvalidRequest
from .hashing import Hashes, process_hasher, seed_of

WorkerId: TypeAlias = str
RequestId: TypeAlias = str


class Role(enum.Flag):
    """What a worker may be asked to do."""

    PREFILL = enum.auto()
    DECODE = enum.auto()
    BOTH = PREFILL | DECODE


class Tier(enum.IntEnum):
    """Where a block lives, fastest first."""

    GPU = 0
    CPU = 1
    DISK = 2
    REMOTE = 3


class State(enum.Enum):
    """How far a worker is in its life; only READY ones get requests."""

    STARTING = "starting"
    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    SLEEPING = "sleeping"


def _prompt(tokens: Prompt | Sequence[int] | bytes) -> Prompt:
    return Prompt.of(tokens)


def _names(names: Iterable[str]) -> frozenset[str]:
    if isinstance(names, str):
        raise InvalidRequest(f"{names!r} is one name, want a collection of names")
    return frozenset(names)


def _is_whole(value: object) -> bool:
    if type(value) is int:
        return True
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _positive(name: str, value: int) -> None:
    if not _is_whole(value) or value < 1:
        raise InvalidRequest(f"{name} is {value!r}, must be a whole number, 1 or more")


@attrs.frozen(kw_only=True, eq=False)
class Request:
    """A generation request, as much of it as scheduling needs.

    Equality is identity: a request is one thing that happens, whose id no
    other request in flight may use.

    Attributes:
        id: Unique among requests in flight.
        prompt: Token ids in any form that `Prompt.of` takes.
        arrived_at: When the client sent it, seconds.
        max_new_tokens: Output cap, at least 1, or None if not given.
        model: Served model name; empty means any.
        lora: Name of a LoRA adapter; empty means none.
        salt: Requests share cached prefixes only under an equal salt.
        media: What the prompt holds beside tokens, images say: where the
            tokens that stand for it begin, and its key, as the engine names it.
        tenant: Who to be fair to.
        session: Turns of one conversation carry one session name.
        priority: Smaller runs earlier, as in vLLM.
        deadline: Absolute time after which nobody waits any more, seconds.
        sheddable: It may be taken off its worker for more urgent work, as
            long as it streamed nothing; it waits again then.
        resumable: That, and going on elsewhere if its worker fails, may happen
            after part of the answer was streamed too: what was said goes behind
            the prompt, and the rest follows.  It may not be the rest that the
            first worker would have said, and a stop string over the seam is
            not seen.

    Raises:
        InvalidRequest: A value is out of range; `EmptyPrompt` for no tokens.

    >>> request = Request(id="r1", prompt=[5, 6, 7], max_new_tokens=8)
    >>> request.prompt_tokens
    3
    """

    id: RequestId
    prompt: Prompt = attrs.field(converter=_prompt)
    arrived_at: float = 0.0
    max_new_tokens: int | None = None
    model: str = ""
    lora: str = ""
    salt: str = ""
    media: tuple[tuple[int, str], ...] = ()
    tenant: str = ""
    session: str = ""
    priority: int = 0
    deadline: float = math.inf
    sheddable: bool = False
    resumable: bool = False

    def __attrs_post_init__(self) -> None:
        # At once, as a request is made for every arrival.
        id = self.id
        try:
            "".join((id, self.model, self.lora, self.salt, self.tenant, self.session))
        except TypeError:
            self._check_texts()
        if not id:
            raise InvalidRequest("a request needs an id")
        most = self.max_new_tokens
        if most is not None and (not _is_whole(most) or most < 1):
            raise InvalidRequest(
                f"max_new_tokens of {self.id!r} is {most!r}, must be a whole number"
                " of at least 1"
            )
        if not _is_whole(self.priority):
            raise InvalidRequest(
                f"priority of {self.id!r} is {self.priority!r}, want a whole number"
            )
        if not self.deadline >= -math.inf:
            raise InvalidRequest(f"deadline of {self.id!r} is {self.deadline!r}")
        if self.media:
            self._check_media()

    def _check_media(self) -> None:
        for item in self.media:
            if not (
                isinstance(item, tuple)
                and len(item) == 2
                and _is_whole(item[0])
                and 0 <= item[0] < self.prompt.tokens
                and isinstance(item[1], str)
                and item[1]
            ):
                raise InvalidRequest(
                    f"media of {self.id!r} has {item!r}, want (place, key)"
                )

    def _check_texts(self) -> None:
        for name in ("id", "model", "lora", "salt", "tenant", "session"):
            if not isinstance(value := getattr(self, name), str):
                raise InvalidRequest(f"{name} of a request is {value!r}, want a str")

    def __deepcopy__(self, memo: object) -> Request:
        return self  # Its identity is what it is, and it never changes.

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return self.prompt.tokens

    def hashes(self, block_tokens: int) -> Hashes:
        """Name each block-aligned prefix of the prompt, shape (blocks,).

        Equal names mean equal leading tokens and media, salt and adapter; the
        block size does not enter, so engines that differ in it can be compared.
        """
        hashes = self.prompt.hashes(block_tokens)
        if self.salt or self.lora:
            hashes = hashes + seed_of(self.salt, self.lora)
        if self.media:
            hashes = process_hasher().mark(hashes, block_tokens, self.media)
        return hashes


@attrs.frozen(kw_only=True)
class Worker:
    """What an engine can do, as it tells when it joins.

    Attributes:
        id: Never used again by another worker, not even after a restart.
        models: Names it answers to; empty means every name.
        loras: Adapters it can apply.
        role: What it may be asked to do.
        state: Where its life begins.
        kv_blocks: Blocks its KV cache holds.
        block_tokens: Tokens a block.
        max_model_tokens: Prompt and output together, at most.
        max_running: Requests it batches at once, at most.
        machine: Name of its profile in `llmd.machines`; empty if unknown.

    >>> Worker(id="a", kv_blocks=100).kv_tokens
    1600
    """

    id: WorkerId
    models: frozenset[str] = attrs.field(default=(), converter=_names)
    loras: frozenset[str] = attrs.field(default=(), converter=_names)
    role: Role = Role.BOTH
    state: State = State.READY
    kv_blocks: int = 50_000
    block_tokens: int = 16
    max_model_tokens: int = 1 << 30
    max_running: int = 256
    machine: str = ""

    def __attrs_post_init__(self) -> None:
        if not self.id:
            raise InvalidRequest("a worker needs an id")
        for name in ("kv_blocks", "block_tokens", "max_model_tokens", "max_running"):
            _positive(f"{name} of worker {self.id!r}", getattr(self, name))

    def serves(self, model: str, lora: str = "", tokens: int = 1) -> bool:
        """Say whether it serves *model* with *lora* at a length of *tokens*.

        >>> Worker(id="a", models={"m"}).serves("m"), Worker(id="a").serves("m", "x")
        (True, False)
        """
        return (
            (not model or not self.models or model in self.models)
            and (not lora or lora in self.loras)
            and tokens <= self.max_model_tokens
        )

    @property
    def kv_tokens(self) -> int:
        """Tokens its KV cache holds."""
        return self.kv_blocks * self.block_tokens


class Load(NamedTuple):
    """What one router has booked on a worker.

    Attributes:
        running_requests: Dispatched there and not ended.
        waiting_requests: Those of them with no first token yet.
        prefill_tokens: Prompt tokens dispatched there and not yet computed.
        context_tokens: Prompt and output tokens of its running requests.
    """

    running_requests: int = 0
    waiting_requests: int = 0
    prefill_tokens: int = 0
    context_tokens: int = 0


@attrs.frozen(kw_only=True)
class Signals:
    """What an engine says of itself, at one moment.

    Attributes:
        waiting_requests: In the engine's own queue.
        running_requests: In its batch.
        kv_usage: Part of the KV cache in use, in [0, 1].
    """

    waiting_requests: float = math.nan
    running_requests: float = math.nan
    kv_usage: float = math.nan
