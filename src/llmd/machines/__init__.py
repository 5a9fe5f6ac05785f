"""What a worker's hardware does in how many seconds."""

from .._face import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
