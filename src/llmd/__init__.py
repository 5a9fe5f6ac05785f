"""The scheduling brain of an LLM serving fleet, in parts you can swap.

Needs attrs, numpy and sortedcontainers; engines, servers and plots are in
`llmd.live`, `llmd.sim` and `llmd.adapters`, imported by name.
"""

from ._face import face

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = face(__name__, __file__)
