"""How many workers: the `Autoscaler` interface and its built-in policies."""

from .._face import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
