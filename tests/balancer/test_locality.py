"""Orders that prefer the worker with the prefix."""
