"""Moving KV blocks between workers: the `KVTransport` interface and its protocol."""

from .._face import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
