from .indexes import ExactIndexContract, PrefixIndexContract
from .routers import RouterContract
from .samples import fleet, request
from .seal import Cheated, sealed

__all__ = [
    "Cheated",
    "ExactIndexContract",
    "PrefixIndexContract",
    "RouterContract",
    "fleet",
    "request",
    "sealed",
]
