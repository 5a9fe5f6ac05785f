"""Who holds which prefix: the `PrefixIndex` interface and its indexes."""

from .exact import ExactIndex
from .guessed import GuessedIndex
from .interface import PrefixIndex

__all__ = ["ExactIndex", "GuessedIndex", "PrefixIndex"]
