"""Bridges to the world outside; import each by name."""
