"""What an engine is told of its connector is looked at before it starts."""

import math

import pytest

from llmd.adapters.vllm.connector_config import transfer_config
from llmd.errors import TransferError


@pytest.mark.parametrize(
    "odd",
    [
        {"timeout_s": math.inf},
        {"timeout_s": math.nan},
        {"timeout_s": -1},
        {"timeout_s": "10"},
        {"offer_s": math.inf},
        {"offer_s": None},
        {"staging_bytes": 0},
        {"staging_bytes": "1g"},
    ],
    ids=str,
)
def test_what_no_transfer_can_take_is_refused(odd):
    with pytest.raises(TransferError, match=next(iter(odd))):
        transfer_config(**odd)
