"""Collect modules of an engine's process only where there is an engine."""

from importlib.util import find_spec

collect_ignore_glob = []
if find_spec("vllm") is None:
    collect_ignore_glob += ["src/llmd/adapters/vllm/connector*.py"]
if find_spec("torch") is None:
    collect_ignore_glob += ["src/llmd/adapters/nixl/kernels.py"]
