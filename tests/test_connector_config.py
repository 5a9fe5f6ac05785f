"""What an engine is told of its connector is looked at before it starts."""

import math

import pytest

from llmd.adapters.vllm.connector_config import (
    PORT,
    check_side_channel,
    nixl_config,
    transfer_config,
)
from llmd.adapters.vllm.engine import VllmEngine
from llmd.errors import EngineError, TransferError


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
        {"role": "producer"},
        {"role": None},
    ],
    ids=str,
)
def test_what_no_transfer_can_take_is_refused(odd):
    with pytest.raises(TransferError, match=next(iter(odd))):
        transfer_config(**odd)


@pytest.mark.parametrize(
    "odd",
    [{"lease_s": -1}, {"lease_s": 0}, {"lease_s": math.nan}, {"role": "both"}],
    ids=str,
)
def test_what_no_lease_can_be_is_refused(odd):
    with pytest.raises(TransferError, match=next(iter(odd))):
        nixl_config(**odd)


@pytest.mark.parametrize("port", ["70000", "80x", "-1", ""])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(EngineError, match=PORT):
        check_side_channel(nixl_config(), {PORT: port})


def test_a_host_that_is_none_is_refused():
    environment = {PORT: "0", "VLLM_NIXL_SIDE_CHANNEL_HOST": "no.such.host.invalid"}
    with pytest.raises(EngineError, match=r"no\.such\.host"):
        check_side_channel(nixl_config(), environment)


def test_ports_are_looked_at_only_where_they_are_used():
    for config in (None, transfer_config(), {"kv_connector": "NixlConnector"}):
        check_side_channel(config, {PORT: "70000"})
    check_side_channel(nixl_config(), {})


@pytest.mark.parametrize(
    "odd",
    [
        {"start_timeout": -1},
        {"start_timeout": math.nan},
        {"start_timeout": "soon"},
        {"signals_every": None},
        {"environment": {"A": 5}},
    ],
    ids=str,
)
def test_what_no_engine_can_start_with_is_refused(odd):
    with pytest.raises(EngineError, match=next(iter(odd))):
        VllmEngine("model", **odd)
