"""The outside world, one module for each part; imported by name."""
