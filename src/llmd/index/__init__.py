"""Who holds which prefix: the `PrefixIndex` interface and its indexes."""

from .._face import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
