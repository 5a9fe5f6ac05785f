"""What other threads ask of the one that owns an agent."""

from __future__ import annotations

import threading
from array import array
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait

import attrs

from ...errors import TransferError
from ...native import loops

_HEARD_NS = 10_000
"""For the owner to notice a call, at most."""
_WATCH_NS = 10_000
"""For which it looks out for calls and mail, without a look at anything else."""
_ALIVE_S = 1.0
"""Between two looks whether the owner, which somebody waits for, lives."""


@attrs.define(eq=False)
class Calls:
    """Calls that wait for their owner, in order.

    Any thread may `put` and `ask`; the rest is for the owner, who takes them, and
    looks out for more as fast as he can (`watch`) or when he wakes up (`nap`).

    Attributes:
        refusal: Why none is taken any more; empty while they are.
        owner: Who carries them out.
    """

    refusal: str = attrs.field(default="", init=False)
    owner: threading.Thread | None = attrs.field(default=None, init=False)
    _waiting: deque[Callable[[], None]] = attrs.field(factory=deque, init=False)
    _called: threading.Event = attrs.field(factory=threading.Event, init=False)
    # How often it rang, and how often that was heard.
    _bell: array[int] = attrs.field(factory=lambda: array("Q", [0, 0]), init=False)
    _napping: bool = attrs.field(default=False, init=False)
    _watching: bool = attrs.field(default=False, init=False)

    def put(self, act: Callable[[], None]) -> None:
        """Let the owner *act* soon.

        Raises:
            TransferError: He takes no more.
        """
        if self.refusal:
            raise TransferError(self.refusal)
        self._waiting.append(act)
        if self._napping:  # setting it takes longer than the rest of this
            self._called.set()
        elif self._watching and loops is not None:
            loops.ring(self._bell, _HEARD_NS)

    def ask(self, act: Callable[[], None]) -> None:
        """Let the owner *act*, and raise here what it raises.

        Raises:
            TransferError: He takes no more, or is who asks.
        """
        self.expect_another_thread()
        answer: Future[None] = Future()

        def answering() -> None:
            try:
                if self.refusal:
                    raise TransferError(self.refusal)
                act()
                answer.set_result(None)
            except Exception as error:
                answer.set_exception(error)

        self.put(answering)
        # Bounded: the owner never waits for a peer.
        while not answer.done() and self.owner is not None and self.owner.is_alive():
            wait([answer], timeout=_ALIVE_S)
        if not answer.done():
            raise TransferError(self.refusal)
        answer.result()

    def expect_another_thread(self) -> None:
        """Refuse to let the owner wait for himself."""
        if threading.current_thread() is self.owner:
            raise TransferError("a wake cannot wait for the transport that calls it")

    def end(self, refusal: str) -> None:
        """Take no more, and let the owner see that."""
        self.refusal = self.refusal or refusal
        self._called.set()

    def take(self) -> bool:
        """Carry out all that wait; return whether any did."""
        if not self._waiting:
            return False
        while self._waiting:
            self._waiting.popleft()()
        return True

    def watch(self, words: list[int]) -> bool:
        """Look out for calls and for words of memory that change, if there are any.

        Others have the interpreter meanwhile.

        Args:
            words: As `loops.watch` wants them.

        Returns:
            Whether there is any.
        """
        self._watching = loops is not None and bool(words)
        if loops is None or not words:
            return False
        found: bool = loops.watch(array("Q", words), self._bell, _WATCH_NS)
        return found

    def nap(self, seconds: float) -> None:
        """Wait for a call for so long."""
        self._napping = True
        # Whoever called before they could see that has left the call there.
        if not self._waiting and self._called.wait(seconds):
            self._called.clear()
        self._napping = False
