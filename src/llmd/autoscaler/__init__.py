"""How many workers: the `Autoscaler` interface and its built-in policies."""

from .interface import Autoscaler, TargetConcurrency

__all__ = ["Autoscaler", "TargetConcurrency"]
