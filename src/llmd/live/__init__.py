"""A driver in real time on asyncio: the same cluster, real engines."""

from .engine import Call, Engine, Output, Report

__all__ = ["Call", "Engine", "Output", "Report"]
