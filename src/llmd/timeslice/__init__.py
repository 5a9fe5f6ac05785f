"""Several engines share one GPU by policy: the `TimeSlice` interface."""

from .._face import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
