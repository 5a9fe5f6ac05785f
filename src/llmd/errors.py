"""What can go wrong, one type for each cause a caller can act on.

Every error of this package is an `LlmdError`; those that also describe a
wrong value or a missing key are `ValueError` or `LookupError` as well, so
code that knows nothing of llmd still catches what it expects.
"""

from __future__ import annotations


class LlmdError(Exception):
    """Any error raised on purpose by this package."""


class InvalidRequest(LlmdError, ValueError):
    """The request itself is wrong: sending it again cannot help."""


class EmptyPrompt(InvalidRequest):
    """A prompt has no tokens."""


class PromptTooLong(InvalidRequest):
    """Prompt and output together exceed what any worker of the model takes."""


class DuplicateRequest(InvalidRequest):
    """The id belongs to a request that has not ended yet."""


class UnknownModel(InvalidRequest, LookupError):
    """No worker serves the model and none is expected to."""


class UnknownAdapter(InvalidRequest, LookupError):
    """No worker of the model serves the LoRA adapter."""


class UnknownSession(InvalidRequest, LookupError):
    """The session was never opened here, or was closed."""


class UnknownWorker(LlmdError, LookupError):
    """No worker has this id."""


class UnknownPool(LlmdError, LookupError):
    """Nothing is known of a pool of workers by this name."""


class BlockSizeMismatch(LlmdError, ValueError):
    """Prefix hashes of one block size were asked for at another."""


class InvalidSnapshot(LlmdError, ValueError):
    """A dumped index is damaged, of another version or under another key."""


class InvalidEvent(LlmdError, ValueError):
    """A cluster cannot accept the event; it changed nothing."""


class PolicyError(LlmdError, ValueError):
    """A policy broke its contract: a NaN, a wrong shape or an exception.

    The message names the policy's type and what it did, for who runs it.

    Attributes:
        policy: Name of the policy's type; empty if it is not known.
    """

    policy: str = ""

    @property
    def brief(self) -> str:
        """What happened, without what the policy said of it, for strangers."""
        policy = f"the policy {self.policy}" if self.policy else "a policy"
        if self.__cause__ is None:
            return f"{policy} broke its contract"
        return f"{policy} raised {type(self.__cause__).__name__}"


class InvalidPolicy(LlmdError, ValueError):
    """A policy was built with values that make no sense."""


class MissingRequest(InvalidPolicy):
    """Use is aimed at as a part of what workers request, which nothing says."""


class NoSignal(LlmdError):
    """What a policy measures cannot be told now; it keeps what it decided."""


class Rejected(LlmdError):
    """The balancer refused the request.

    Attributes:
        reason: In words, for the client.
        retry_after: Seconds until another try makes sense; NaN if unknown.
    """

    def __init__(self, reason: str, retry_after: float = float("nan")) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after


class DeadlineExceeded(LlmdError, TimeoutError):
    """The request was still waiting or running when its deadline passed."""


class WorkerLost(LlmdError):
    """The worker died after part of an answer that is not `resumable`."""


class EngineError(LlmdError):
    """An engine refused a call or failed to start."""


class InvalidHardware(LlmdError, ValueError):
    """A hardware profile, a model's shape or a probe cannot be right."""


class UnknownHardware(LlmdError, LookupError):
    """What the driver says of a device matches no profile."""


class DoesNotFit(LlmdError, ValueError):
    """Engines wanted on one GPU need more memory than it has."""


class InvalidSlice(LlmdError, ValueError):
    """A time slice was set up wrongly: a name, a weight or a quantum."""


class TransferError(LlmdError):
    """KV blocks could not be moved; the prompt can always be computed again."""


class HandshakeRefused(TransferError, ValueError):
    """Two transports must not exchange blocks.

    Attributes:
        field: What differs: `key`, `protocol`, or a field of the layout.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field


class CircuitOpen(TransferError):
    """The peer failed too often lately; nothing is tried for a while."""


class NoWay(TransferError):
    """There is no way for KV between two workers; the message says why."""


def policy_error(policy: object, error: Exception) -> LlmdError:
    """Return what a failing policy costs the request it was asked about."""
    if not isinstance(error, PolicyError):
        said = shortened(str(error), 500)
        name = type(policy).__name__
        wrapped = PolicyError(f"{name} raised {type(error).__name__}: {said}")
        wrapped.__cause__ = error
        error = wrapped
    error.policy = error.policy or type(policy).__name__
    return error


def shortened(text: str, characters: int) -> str:
    """Return *text* with its middle left out if it has more *characters*.

    >>> shortened("a policy of many settings", 15)
    'a poli...ttings'
    """
    if len(text) <= characters:
        return text
    kept = max(characters - 3, 2) // 2
    return f"{text[:kept]}...{text[-kept:]}"


def shown(value: object, characters: int = 100) -> str:
    """Return the repr of *value*, short enough for a message.

    >>> len(shown("x" * 5000))
    99
    """
    return shortened(repr(value), characters)
