"""Amounts that make sense, for whatever a time slice is set up with."""

from __future__ import annotations

from functools import partial

from ..amounts import a_number
from ..errors import InvalidSlice

SHORTEST_TURN_S = 1e-6
"""A turn is asked for again no sooner: what rounding leaves of one is less."""

amount = partial(a_number, error=InvalidSlice)
