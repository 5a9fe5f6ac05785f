"""Which worker: the `Router` interface and its policies."""

from .._face import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
