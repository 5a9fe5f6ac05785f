"""What a vLLM server is asked and answers, without a server."""

import json
import math

import pytest

from llmd.adapters.vllm.completions import Chunks, body, refusal, whole
from llmd.adapters.vllm.sampling import checked
from llmd.errors import EngineError, InvalidRequest, PromptTooLong, UnknownModel
from llmd.live.engine import Call
from llmd.types import Request


def call(**fields):
    request = Request(
        id="r",
        prompt=[5, 6, 7],
        max_new_tokens=fields.pop("new", 4),
        salt=fields.pop("salt", ""),
        priority=3,
    )
    return Call(request=request, **fields)


def line(**chunk):
    return "data: " + json.dumps(chunk)


def choice(text, ids, reason=None):
    return {"text": text, "token_ids": ids, "finish_reason": reason}


class TestBody:
    def test_a_plain_call_streams(self):
        wanted = body(call(sampling={"temperature": 0.5}), "m", 100, priorities=False)
        assert wanted == {
            "model": "m",
            "prompt": [5, 6, 7],
            "request_id": "r",
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 4,
            "temperature": 0.5,
        }

    def test_without_a_cap_the_model_is_filled(self):
        # The server's own default would be 16.
        assert body(call(new=None), "m", 100, priorities=False)["max_tokens"] == 97

    def test_salt_priority_and_transfer(self):
        handed = {"remote_block_ids": [1, 2]}
        wanted = body(call(salt="s", kv_transfer=handed), "m", 100, priorities=True)
        assert wanted["cache_salt"] == "s"
        assert wanted["priority"] == 3
        assert wanted["kv_transfer_params"] == handed

    def test_a_prefill_is_one_token_and_whole(self):
        wanted = body(call(prefill_only=True), "m", 100, priorities=False)
        assert wanted["max_tokens"] == 1
        assert not wanted["stream"]
        assert "stream_options" not in wanted
        assert wanted["kv_transfer_params"]["do_remote_decode"]

    def test_what_does_not_fit_is_not_asked(self):
        with pytest.raises(PromptTooLong):
            body(call(new=98), "m", 100, priorities=False)


class TestChunks:
    def test_the_last_piece_waits_for_the_counts(self):
        chunks = Chunks()
        (first,) = chunks.take(line(choices=[choice("a", [1])]))
        assert (first.text, first.token_ids, first.cached_tokens) == ("a", (1,), None)
        assert chunks.take("") == []
        assert chunks.take(line(choices=[choice("b", [2], "length")])) == []
        usage = {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
        assert chunks.take(line(choices=[], usage=usage)) == []
        assert not chunks.done
        (last,) = chunks.take("data: [DONE]")
        assert chunks.done
        assert (last.text, last.finish_reason, last.cached_tokens) == ("b", "length", 2)

    @pytest.mark.parametrize("data", ["{", "7", '{"error": {"message": "x"}}'])
    def test_nonsense_and_errors(self, data):
        with pytest.raises(EngineError):
            Chunks().take("data: " + data)

    def test_an_error_chunk_with_a_code(self):
        with pytest.raises(InvalidRequest, match="no"):
            Chunks().take(line(error={"message": "no", "code": 400}))

    def test_a_generation_that_failed(self):
        with pytest.raises(EngineError):
            Chunks().take(line(choices=[choice("", [], "error")]))

    def test_a_whole_answer_has_the_hand_off(self):
        answer = {
            "choices": [choice("a", [1], "length")],
            "kv_transfer_params": {"k": 1},
        }
        output = whole(json.dumps(answer).encode())
        assert output.kv_transfer == {"k": 1}
        assert output.token_ids == (1,)
        with pytest.raises(EngineError):
            whole(b'{"choices": []}')


@pytest.mark.parametrize(
    ("status", "text", "error"),
    [
        (400, '{"error": {"message": "bad top_p", "code": 400}}', InvalidRequest),
        (400, '{"error": {"message": "maximum context length"}}', PromptTooLong),
        (422, "plain", InvalidRequest),
        (404, '{"error": {"message": "no model"}}', UnknownModel),
        (500, "<html>", EngineError),
        (503, '{"error": "busy"}', EngineError),
        (0, '{"error": {"message": "x", "code": "nonsense"}}', EngineError),
    ],
)
def test_refusals_by_status(status, text, error):
    assert type(refusal(status, text)) is error


def test_sampling_of_both_apis():
    assert checked({"logprobs": True, "top_logprobs": 3}) == {"logprobs": 3}
    assert checked({"logprobs": True}) == {"logprobs": 0}
    assert checked({"logprobs": False}) == {}
    assert checked({"logprobs": 2, "n": 1, "seed": None}) == {"logprobs": 2}
    assert checked({"bad_words": "x"}) == {"bad_words": ["x"]}
    for bad in ({"seed": 1.5}, {"seed": True}, {"seed": 1 << 70}, {"top_p": math.inf}):
        with pytest.raises(InvalidRequest):
            checked(bad)


PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="awake"} 1.0
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="discard_all"} 0.0
vllm:engine_sleep_state{engine="1",model_name="m",sleep_state="awake"} 0.0
vllm:engine_sleep_state{engine="1",model_name="m",sleep_state="discard_all"} 1.0
vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="100"} 1.0
vllm:cache_config_info{block_size="32",engine="1",num_gpu_blocks="None"} 1.0
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 427.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 192.0
vllm:prefix_cache_hits_created{engine="0",model_name="m"} 1.7e+09
vllm:prompt_tokens_by_source_total{engine="0",source="local_compute"} 235.0
vllm:prompt_tokens_by_source_total{engine="0",source="local_cache_hit"} 192.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 1.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 4.0
python_gc_objects_collected_total{generation="0"} 1.0
"""


def test_metrics_by_engine():
    pytest.importorskip("prometheus_client")
    from llmd.adapters.vllm.metrics import combined, read_metrics

    engines = read_metrics(PAGE)
    assert set(engines) == {"0", "1"}
    zero, one = engines["0"], engines["1"]
    assert zero.signals.waiting_requests == 2
    assert (zero.block_tokens, zero.kv_blocks, one.kv_blocks) == (32, 99, 0)
    assert (zero.asleep, one.asleep) == (False, True)
    assert (zero.prefix_queries, zero.prefix_hits) == (427, 192)
    assert zero.computed_tokens == 235
    assert math.isnan(one.computed_tokens)
    assert zero.finished == {"stop": 1, "length": 4}
    signals = combined(engines)
    assert (signals.running_requests, signals.waiting_requests) == (4, 2)
    assert signals.kv_usage == 0.375
    assert math.isnan(combined({}).running_requests)
    assert read_metrics("") == {}
    with pytest.raises(ValueError, match="engine=0"):
        read_metrics("vllm:num_requests_running{engine=0} nonsense")
