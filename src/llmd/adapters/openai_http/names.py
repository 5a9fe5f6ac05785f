"""What clients may ask for by name: models and LoRA adapters."""

from __future__ import annotations

import attrs

from ...errors import UnknownModel
from ...live import Server
from ...types import Request, State, Worker

UNKNOWN = "unknown"
# Such a worker cannot say yet what it serves.
_SILENT = (State.STARTING, State.LOADING)


@attrs.frozen(eq=False)
class Names:
    """Tells the names that *server* knows at this moment."""

    server: Server

    def listed(self) -> list[str]:
        """Return all of them, in order."""
        workers = self.server.cluster.view.workers.facts
        served = set().union(*(worker.models | worker.loras for worker in workers))
        return sorted(served | self.server.cluster.models)

    def resolve(self, name: str) -> tuple[str, str]:
        """Return the model and the adapter that *name* means.

        As in vLLM's server, an adapter is asked for by its own name.

        Raises:
            UnknownModel: It means nothing here.
        """
        workers = self.server.cluster.view.workers
        for worker in workers.facts:
            if name in worker.loras and name not in worker.models:
                return "", name
        if not name or name in self.server.cluster.models:
            return name, ""
        for worker, state in zip(workers.facts, workers.states, strict=True):
            if state not in _SILENT and serves(worker, name, ""):
                return name, ""
        raise self.unknown(name)

    def unknown(self, name: str) -> UnknownModel:
        """Return the error that *name* means nothing here."""
        known = ", ".join(self.listed()) or "none"
        return UnknownModel(f"no worker serves model {name!r}; known: {known}")

    def label(self, request: Request) -> str:
        """Return the name that a request is counted under.

        Clients make up names, and a label lives as long as the process: only
        what the operator named has one of its own.
        """
        name = request.lora or request.model
        if not name or name in self.server.cluster.models:
            return name
        workers = self.server.cluster.view.workers.facts
        named = any(name in worker.models | worker.loras for worker in workers)
        return name if named else UNKNOWN


def serves(worker: Worker, model: str, lora: str) -> bool:
    """Say whether *worker* answers for the model, or applies the adapter."""
    if lora:
        return lora in worker.loras
    return not model or not worker.models or model in worker.models
