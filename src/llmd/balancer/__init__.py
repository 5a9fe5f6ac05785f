"""Who goes next, who may enter, and where: `QueueBalancer` and its policies."""

from .._face import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
