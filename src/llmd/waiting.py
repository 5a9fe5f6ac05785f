"""The requests that wait, in the order a `QueueBalancer` gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
from sortedcontainers import SortedDict

from .types import Request, RequestId


@attrs.define(eq=False)
class WaitingRequests:
    """Requests by model and key; equal keys stay in order of `push`.

    Models wait apart, so that one whose workers are full holds up no other.
    Each call is O(log n).
    """

    _queues: dict[str, Any] = attrs.field(factory=dict, init=False)
    _places: dict[RequestId, tuple[Any, int]] = attrs.field(factory=dict, init=False)
    _requests: dict[RequestId, Request] = attrs.field(factory=dict, init=False)
    _pushed: int = attrs.field(default=0, init=False)
    _prompt_tokens: int = attrs.field(default=0, init=False)

    def push(self, key: Any, request: Request) -> None:
        """Let *request* wait at *key*.

        Raises:
            TypeError: The key cannot be compared with another; nothing changed.
        """
        place = (key, self._pushed)
        queue = self._queues.get(request.model)
        if queue is None:
            queue = self._queues[request.model] = SortedDict()
        queue[place] = request
        self._pushed += 1
        self._places[request.id] = place
        self._requests[request.id] = request
        self._prompt_tokens += request.prompt_tokens

    def models(self) -> tuple[str, ...]:
        """Return the models that somebody waits for."""
        return tuple([model for model, queue in self._queues.items() if queue])

    def peek(self, model: str) -> Request | None:
        """Return the next request for *model*, if any."""
        queue = self._queues.get(model)
        return queue.peekitem(0)[1] if queue else None

    def remove(self, id: RequestId) -> Request | None:
        """Take a request out; None if it does not wait."""
        request = self._requests.pop(id, None)
        if request is None:
            return None
        del self._queues[request.model][self._places.pop(id)]
        self._prompt_tokens -= request.prompt_tokens
        return request

    def drop_model(self, model: str) -> list[Request]:
        """Take out and return all requests for *model*, next first."""
        dropped = [*self._queues.pop(model, SortedDict()).values()]
        for request in dropped:
            del self._requests[request.id], self._places[request.id]
            self._prompt_tokens -= request.prompt_tokens
        return dropped

    @property
    def prompt_tokens(self) -> int:
        """Sum of the waiting prompts."""
        return self._prompt_tokens

    def of_model(self, model: str) -> int:
        """Count those for *model*."""
        return len(self._queues.get(model, ()))

    def __contains__(self, id: RequestId) -> bool:
        return id in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        for queue in self._queues.values():
            yield from queue.values()
