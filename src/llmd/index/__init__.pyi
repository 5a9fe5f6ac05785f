from .blended import BlendedIndex
from .exact import ExactIndex
from .guessed import GuessedIndex
from .interface import PrefixIndex
from .snapshot import dump, restore

__all__ = [
    "BlendedIndex",
    "ExactIndex",
    "GuessedIndex",
    "PrefixIndex",
    "dump",
    "restore",
]
