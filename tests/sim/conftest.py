"""Where the public traces are, if they are there."""

import os
from pathlib import Path

import pytest


def trace(name):
    folder = os.environ.get("LLMD_TRACES")
    if not folder:
        pytest.skip("set LLMD_TRACES to the folder of public traces")
    return Path(folder) / name


@pytest.fixture(scope="session")
def sample():
    return Path(__file__).parent.parent / "data" / "mooncake_conversation_300.jsonl"


@pytest.fixture(scope="session")
def conversation():
    from llmd.sim import traces

    return traces.mooncake(trace("mooncake_conversation.jsonl.zst"))


@pytest.fixture(scope="session")
def first1000():
    from llmd.sim import traces

    return traces.mooncake(trace("mooncake_arxiv_first1000.jsonl.zst"))
