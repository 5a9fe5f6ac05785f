"""Workloads: reproducible, shaped as asked, and read as they were written."""

import gzip
import json
import pickle

import attrs
import numpy as np
import pytest

from llmd import Request
from llmd.blocks import Prompt
from llmd.errors import BlockSizeMismatch, InvalidRequest
from llmd.sim import Job, Workload, traces, workloads
from llmd.sim.arrivals import gamma
from llmd.sim.prompts import SegmentPrompt

MAKERS = [
    workloads.dialogue,
    workloads.documents,
    workloads.batch,
    workloads.shared_prefix,
    workloads.mixed,
]


def content(workload):
    return [
        (
            job.id,
            job.at,
            job.output_tokens,
            job.follows,
            job.request.hashes(16).tolist(),
        )
        for job in workload.jobs
    ]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_equal_seeds_give_equal_workloads_and_others_do_not(make):
    one = make(requests=60, seed=5)
    assert len(one) == 60
    assert content(one) == content(make(requests=60, seed=5))
    assert content(one) == content(make(requests=60, seed=1).seeded(5))
    assert content(one) != content(make(requests=60, seed=6))
    assert content(pickle.loads(pickle.dumps(one))) == content(one)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_stretched_workload_keeps_its_rate_under_other_seeds(make):
    load = make(rate=2.0, requests=80, seed=1)
    faster = load.at_rate(2 * load.rate)
    assert faster.rate == pytest.approx(2 * load.rate)
    again, plain = faster.seeded(9), load.seeded(9)
    assert again.span_s == pytest.approx(plain.span_s / 2)


def test_every_turn_extends_the_answer_before_it():
    load = workloads.dialogue(requests=80, turns=6.0, seed=2)
    jobs = {job.id: job for job in load.jobs}
    followers = [job for job in load.jobs if job.follows]
    assert followers
    for job in followers:
        answer = jobs[job.follows].answer
        names = answer.hashes(16)
        assert (job.request.hashes(16)[: len(names)] == names).all()
        assert job.request.prompt_tokens > answer.tokens


def test_groups_share_their_system_prompt_and_nothing_else():
    load = workloads.shared_prefix(requests=100, groups=5, users_per_group=3, seed=1)
    by_group = {}
    for job in load.jobs:
        by_group.setdefault(job.request.tenant, []).append(job.request.hashes(16))
    assert len(by_group) == 5
    for names in by_group.values():
        assert len({tuple(n[: 6000 // 16].tolist()) for n in names}) == 1
    first = {n[0][0] for n in by_group.values()}
    assert len(first) == 5


@pytest.mark.parametrize("burstiness", [0.0, 0.5, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_burstiness_asked_for(burstiness):
    times = gamma(5.0, 40_000, np.random.default_rng(0), burstiness)
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(burstiness, rel=0.1, abs=1e-9)


@pytest.mark.parametrize("size", [1, 16, 48, 100, 512])
def test_segments_name_prefixes_as_their_tokens_would(size):
    one = SegmentPrompt([(1, 100), (2, 700), (3, 55)])
    two = SegmentPrompt([(1, 100), (2, 700), (4, 900)])
    real = [p.tokenised().hashes(size) for p in (one, two)]
    names = [p.hashes(size) for p in (one, two)]
    for ours, theirs in zip(names, real, strict=True):
        assert len(ours) == len(theirs) == len(set(ours.tolist()))
    common = min(map(len, names))
    same = names[0][:common] == names[1][:common]
    assert (same == (real[0][:common] == real[1][:common])).all()
    assert same.sum() == 800 // size


def test_mooncake_survives_a_round_trip(sample, tmp_path):
    load = traces.mooncake(sample)
    path = tmp_path / "again.jsonl"
    traces.write_mooncake(load, path)
    again = traces.mooncake(path)
    assert [job.at for job in again.jobs] == [job.at for job in load.jobs]
    assert [j.output_tokens for j in again.jobs] == [j.output_tokens for j in load.jobs]
    ids = {}
    for one, other in zip(load.jobs, again.jobs, strict=True):
        assert one.request.prompt_tokens == other.request.prompt_tokens
        names = one.request.hashes(512).tolist(), other.request.hashes(512).tolist()
        for name, new in zip(*names, strict=True):
            assert ids.setdefault(name, new) == new
    assert len(set(ids.values())) == len(ids)


def test_a_generated_workload_can_be_written_as_mooncake(tmp_path):
    load = workloads.dialogue(requests=40, system_tokens=1100, think_s=2.0)
    path = tmp_path / "d.jsonl"
    traces.write_mooncake(load, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 40
    assert [line["timestamp"] for line in lines] == sorted(
        line["timestamp"] for line in lines
    )
    for line in lines:
        assert len(line["hash_ids"]) == -(-line["input_length"] // 512)


def test_azure_reads_gzip_and_shares_nothing(tmp_path):
    path = tmp_path / "azure.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n")
        file.write("2023-11-16 18:15:46.6805900,374,44\n")
        file.write("2023-11-16 18:15:50.9951690,374,109\n")
    load = traces.azure(path)
    assert [job.output_tokens for job in load.jobs] == [44, 109]
    assert load.span_s == pytest.approx(4.314579)
    one, two = (job.request.hashes(16) for job in load.jobs)
    assert not set(one.tolist()) & set(two.tolist())


def weka_line(requests):
    return json.dumps({"id": "x", "block_size": 64, "requests": requests}) + "\n"


def turn(at, ids, think=1.0, **more):
    tokens = len(ids) * 64 + 10
    base = {"t": at, "type": "n", "in": tokens, "out": 5, "hash_ids": ids}
    return base | {"think_time": think, "api_time": 2.0} | more


def test_weka_sessions_follow_their_answers_and_local_ids_stay_local(tmp_path):
    path = tmp_path / "weka.jsonl"
    sub = {
        "t": 5.0,
        "type": "subagent",
        "requests": [turn(0.0, [1]), turn(3.0, [1, 2])],
    }
    session = [turn(0.0, [1, 2]), sub, turn(9.0, [1, 2, 3], think=7.0)]
    path.write_text(weka_line(session) + weka_line([turn(0.0, [1, 2])]))
    load = traces.weka(path)
    jobs = {job.id: job for job in load.jobs}
    assert jobs["k0.2"].follows == "k0.0"
    assert jobs["k0.2"].think_s == 7.0
    assert jobs["k0.1.0"].follows == "k0.0"
    assert jobs["k0.1.0"].think_s == pytest.approx(3.0)
    assert jobs["k0.1.1"].follows == "k0.1.0"
    first, third = (jobs[id].request.hashes(64) for id in ("k0.0", "k0.2"))
    assert (first == third[:2]).all()
    other = jobs["k1.0"].request.hashes(64)
    assert not set(first.tolist()) & set(other.tolist())


PROFILE = {
    "input_sequence_length": {
        "min": 100,
        "max": 9000,
        "mean": 2000,
        "standard_deviation": 500,
        "distribution_type": "normal",
    },
    "output_sequence_length": {
        "min": 10,
        "max": 1000,
        "mean": 200,
        "standard_deviation": 100,
        "distribution_type": "log_normal",
    },
    "number_of_turns": {
        "min": 1,
        "max": 9,
        "mean": 3,
        "standard_deviation": 1,
        "distribution_type": "normal",
    },
    "input_sequence_length_per_turn": {
        "min": 50,
        "max": 50,
        "mean": 50,
        "standard_deviation": 0,
        "distribution_type": "normal",
    },
    "system_prompt": {
        "min": 500,
        "max": 500,
        "mean": 500,
        "standard_deviation": 0,
        "distribution_type": "normal",
    },
}


def test_a_catalogue_profile_has_its_means(tmp_path):
    path = tmp_path / "chat" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(PROFILE))
    load = traces.inference_perf(path, requests=900, rate=2.0)
    assert load.name == "chat"
    assert len(load) == 900
    heads = [job for job in load.jobs if not job.follows]
    assert len(load) / len(heads) == pytest.approx(3.0, rel=0.1)
    mean = np.mean([job.request.prompt_tokens for job in heads])
    assert mean == pytest.approx(2550, rel=0.05)
    assert load.output_tokens / len(load) == pytest.approx(200, rel=0.1)
    shared = {tuple(job.request.hashes(16)[: 500 // 16].tolist()) for job in heads}
    assert len(shared) == 1


def test_a_broken_file_says_which_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    good = '{"timestamp": 0, "input_length": 9, "output_length": 2, "hash_ids": [1]}'
    for bad in (
        '{"timestamp": 0}',
        "not json",
        "[]",
        good.replace('"timestamp": 0', '"timestamp": NaN'),
        good.replace('"timestamp": 0', '"timestamp": -5'),
        good.replace("9", '"nine"'),
        good.replace("[1]", "[-1]"),
        good.replace("[1]", "7"),
    ):
        path.write_text(f"{good}\n{bad}\n")
        with pytest.raises(InvalidRequest, match=r"bad.jsonl, line 2"):
            traces.mooncake(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequest, match="no text"):
        traces.mooncake(path)


def test_azure_rows_may_have_zones_and_whole_seconds_and_any_order(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(
        "\ufeffTIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:02.5000000+00:00,10,2\n"
        "2024-05-10 00:00:01+00:00,20,3\n"
        "2024-05-10 00:00:04.2500000,30,4\n"
    )
    assert [job.at for job in traces.azure(path)] == [0.0, 1.5, 3.25]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nnever,1,1\n")
    with pytest.raises(InvalidRequest, match="line 2"):
        traces.azure(path)


def test_jobs_that_were_changed_are_not_remade_without_the_change():
    load = workloads.dialogue(requests=40, seed=1)
    short = [attrs.evolve(job, output_tokens=1) for job in load]
    changed = attrs.evolve(load, jobs=short)
    assert changed.remake is None
    for seed in (2, 3):
        assert {job.output_tokens for job in changed.seeded(seed)} == {1}
    assert attrs.evolve(changed, remake=load.remake).remake is None


def test_what_has_its_own_jobs_is_remade():
    load = workloads.dialogue(requests=40, seed=1).at_rate(3.0)
    named = attrs.evolve(load, name="other")
    assert content(named.seeded(2)) == content(load.seeded(2))
    again = pickle.loads(pickle.dumps(load))
    assert content(attrs.evolve(again, name="it").seeded(2)) == content(load.seeded(2))
    assert content(load.seeded(2)) != content(load)


@pytest.mark.parametrize("change", ["at_rate", "jittered"])
def test_followers_move_with_whom_they_follow(change, tmp_path):
    load = workloads.dialogue(rate=4.0, requests=300, seed=1)
    moved = load.at_rate(1.0) if change == "at_rate" else load.jittered(50.0)
    before = {}
    for job in moved:
        assert not job.follows or before[job.follows].at <= job.at
        before[job.id] = job
    few = [sum(bool(job.follows) for job in w.first(100)) for w in (load, moved)]
    assert few[1] > few[0] / 2
    traces.write_mooncake(moved, tmp_path / "out.jsonl")
    assert len(traces.mooncake(tmp_path / "out.jsonl")) == 300


def test_deadlines_move_with_arrivals():
    load = workloads.batch(rate=10.0, requests=20)
    jobs = [
        attrs.evolve(job, request=attrs.evolve(job.request, deadline=job.at + 5.0))
        for job in load
    ]
    load = attrs.evolve(load, jobs=jobs)
    for moved in (load.at_rate(1.0), load.jittered(30.0)):
        for job in moved:
            assert job.request.deadline == pytest.approx(job.at + 5.0)


def test_a_jittered_workload_stays_so_from_seed_to_seed():
    load = workloads.shared_prefix(rate=10.0, requests=60).jittered(200.0)
    assert load.seeded(3).span_s > 100.0
    assert load.at_rate(100.0).seeded(3).span_s < 10.0


def test_long_medians_are_what_they_say():
    load = workloads.batch(requests=400, prompt_tokens=50_000, answer_tokens=20_000)
    prompts = sorted(job.request.prompt_tokens for job in load)
    answers = sorted(job.output_tokens for job in load)
    assert prompts[200] == pytest.approx(50_000, rel=0.1)
    assert answers[200] == pytest.approx(20_000, rel=0.1)


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (workloads.batch, {"prompt_tokens": -5}),
        (workloads.batch, {"answer_tokens": float("nan")}),
        (workloads.batch, {"burstiness": float("nan")}),
        (workloads.batch, {"requests": 0}),
        (workloads.dialogue, {"system_tokens": -5}),
        (workloads.dialogue, {"system_prompts": 0}),
        (workloads.dialogue, {"seed": -1}),
        (workloads.documents, {"questions_per_document": 0.5}),
        (workloads.shared_prefix, {"groups": 0}),
        (workloads.mixed, {"requests": 0}),
    ],
)
def test_generators_refuse_what_makes_no_workload(make, bad):
    with pytest.raises(InvalidRequest):
        make(**bad)


def test_jitter_moves_later_by_less_than_its_width(sample):
    load = traces.mooncake(sample)
    moved = {job.id: job.at for job in load.jittered(3.0, seed=1).jobs}
    moves = np.array([moved[job.id] - job.at for job in load.jobs])
    assert ((moves >= 0) & (moves < 3)).all()
    assert moves.std() > 0.5


def profile(tmp_path, **more):
    shape = {"mean": 100.0, "standard_deviation": 10.0, "min": 60.0, "max": 140.0}
    path = tmp_path / "config.json"
    given = {"input_sequence_length": shape, "output_sequence_length": shape} | more
    path.write_text(json.dumps(given))
    return traces.inference_perf(path, requests=200, rate=2.0)


def test_a_profile_without_turns_has_prompts_of_its_distribution(tmp_path):
    tokens = [job.request.prompt_tokens for job in profile(tmp_path)]
    assert np.mean(tokens) == pytest.approx(100.0, rel=0.05)
    assert 5.0 < np.std(tokens) < 15.0


def test_a_profile_of_turns_alone_spreads_its_input_over_them(tmp_path):
    turns = {"mean": 4.0, "standard_deviation": 0.0, "min": 4.0, "max": 4.0}
    load = profile(tmp_path, number_of_turns=turns)
    # Fourth prompts hold all of the input, and three answers.
    last = [job for job in load if job.id.endswith(".3")]
    answers = [job for job in load if not job.id.endswith(".3")]
    said = np.mean([job.output_tokens for job in answers])
    tokens = np.mean([job.request.prompt_tokens for job in last])
    assert tokens == pytest.approx(100.0 + 3 * said, rel=0.05)


LINE = '{"timestamp": 0, "input_length": 2048, "output_length": 5, "hash_ids": [%s]}\n'


def test_blank_lines_are_no_requests(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text("\n" + LINE % "7, 8, 9, 10" + "\n\n")
    assert len(traces.mooncake(path)) == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (LINE % "7, 7, 8, 9", "named twice"),
        (LINE.replace("2048", "-3") % "7, 8, 9, 10", "no number of tokens"),
        (LINE.replace("2048", "1e30") % "7, 8, 9, 10", "no number of tokens"),
        ("[" * 100_000, "line 1"),
        (LINE[:30], "no JSON at character"),
    ],
)
def test_a_line_that_makes_no_request_is_refused(tmp_path, text, why):
    path = tmp_path / "some.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=why):
        traces.mooncake(path)


@pytest.mark.parametrize("damage", ["cut", "changed", "none of it"])
def test_a_damaged_gz_is_refused(tmp_path, damage):
    path = tmp_path / "some.jsonl.gz"
    traces.write_mooncake(workloads.batch(requests=200), path)
    assert len(traces.mooncake(path)) == 200
    whole = bytearray(path.read_bytes())
    if damage == "cut":
        whole = whole[: len(whole) // 2]
    elif damage == "changed":
        whole[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    else:
        whole = b"plain text"
    path.write_bytes(whole)
    with pytest.raises(InvalidRequest):
        traces.mooncake(path)


def test_what_cannot_be_written_leaves_no_file(tmp_path):
    job = Job(
        request=Request(id="a", prompt=Prompt.named([1], block_tokens=64, tokens=64)),
        output_tokens=1,
    )
    path = tmp_path / "some.jsonl"
    with pytest.raises(BlockSizeMismatch):
        traces.write_mooncake(Workload(name="odd", jobs=[job]), path)
    assert not path.exists()


def test_an_azure_row_may_be_of_another_zone(tmp_path):
    path = tmp_path / "some.csv"
    rows = "2023-11-16 18:15:46.6805900", "2023-11-16 20:15:47+02:00"
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    path.write_text(text + "".join(f"{row},5,5\n" for row in rows))
    assert [job.at for job in traces.azure(path)] == pytest.approx([0.0, 0.31941])
    path.write_text(text + "x" * 200_000 + ",5,5\n")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        traces.azure(path)
